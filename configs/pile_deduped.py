# Named after a size's config: train.py configs/pythia_70m.py configs/pile_deduped.py
# The deduplicated Pile, as published in training order: EleutherAI/pile-deduped-pythia-preshuffled.
# 207B tokens, so a run sees 72 % of two epochs shuffled together (data.py, build_order).
data = "data/pile_deduped/document"
