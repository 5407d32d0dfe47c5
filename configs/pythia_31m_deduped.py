# Pythia-31M-deduped: the same on the deduplicated Pile (not among the published models).
from configs.pythia_31m import *
from configs.pile_deduped import *
