# Pythia-12B-deduped: the same on the deduplicated Pile.
from configs.pythia_12b import *
from configs.pile_deduped import *
