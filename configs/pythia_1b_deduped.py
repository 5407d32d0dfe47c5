# Pythia-1B-deduped: the same on the deduplicated Pile, but in float16 as published.
from configs.pythia_1b import *
from configs.pile_deduped import *

dtype = "float16"
