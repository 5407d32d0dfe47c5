# Pythia-1B-deduped: the same on the deduplicated Pile.
from configs.pythia_1b import *
from configs.pile_deduped import *

dtype = "float16"  # unlike its standard twin
