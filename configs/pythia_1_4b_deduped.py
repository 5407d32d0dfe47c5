# Pythia-1.4B-deduped: the same on the deduplicated Pile.
from configs.pythia_1_4b import *
from configs.pile_deduped import *
