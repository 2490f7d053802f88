"""Texts and conversations. Their options are older than sections by kind and stand in other sections."""

SECTION = None
DATA, WEIGHT, BATCH = "data.generative", "loss.loss_gen_factor", "training.generative_batch_size"
LOSS = "next_token"
EMBEDS = False
