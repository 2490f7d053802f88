"""Queries with their passages. Their options are older than sections by kind and stand in other sections."""

SECTION = None
"""Dataclass of the section of RunConfig that is called as the kind is; None: there is none."""
DATA, WEIGHT, BATCH = "data.embedding", "loss.loss_emb_factor", "training.embedding_batch_size"
"""Keys of its sources, of the weight of its loss, and of how many of its samples a step takes."""
LOSS = "contrastive"
"""File of its loss in losses/."""
EMBEDS = True
"""Whether its rows are embedded; if not, their next tokens are predicted."""
