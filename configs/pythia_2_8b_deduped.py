# Pythia-2.8B-deduped: the same on the deduplicated Pile.
from configs.pythia_2_8b import *
from configs.pile_deduped import *
