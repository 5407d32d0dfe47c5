# Pythia-70M-deduped: the same on the deduplicated Pile.
from configs.pythia_70m import *
from configs.pile_deduped import *
