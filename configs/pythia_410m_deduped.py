# Pythia-410M-deduped: the same on the deduplicated Pile.
from configs.pythia_410m import *
from configs.pile_deduped import *
