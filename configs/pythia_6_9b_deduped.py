# Pythia-6.9B-deduped: the same on the deduplicated Pile.
from configs.pythia_6_9b import *
from configs.pile_deduped import *
