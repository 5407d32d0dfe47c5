# Pythia-14M-deduped: the same on the deduplicated Pile (not among the published models).
from configs.pythia_14m import *
from configs.pile_deduped import *
