# Pythia-160M-deduped: the same on the deduplicated Pile.
from configs.pythia_160m import *
from configs.pile_deduped import *
