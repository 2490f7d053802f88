"""Options of Megatron-LM's Retro tools (tools/retro/preprocess_data.py, before it main.py): the setting that means the
same, or what to do instead."""

from __future__ import annotations

_OF_TRAINING = (
    "leave it out: a table has the neighbors of every chunk of query_paths, whatever the seed, the batch, the length "
    "or the number of samples of a run"
)
_EMBEDDER = "an embedder brings its own tokenizer and shape; give its directory with --embedder"

MEGATRON_NAMES = {
    "retro_project_dir": "project_dir",
    "retro_workdir": "project_dir",
    "retro_tasks": "tasks",
    "retro_task_validate": "validate",
    "retro_block_size": "block_size",
    "retro_doc_block_size": "doc_block_size",
    "retro_gpt_data_path": "data_paths",
    "retro_gpt_seed": "seed",
    "retro_gpt_chunk_length": "chunk_length",
    "retro_gpt_tokenizer_model": "tokenizer",
    "retro_bert_max_chunk_length": "embedder_max_length",
    "retro_index_str": "index",
    "retro_index_ntrain": "ntrain",
    "retro_index_train_load_fraction": "train_load_fraction",
    "retro_index_add_load_fraction": "add_load_fraction",
    "retro_index_no_delete_training_embeddings": "keep_embeddings",
    "retro_index_no_delete_added_codes": "keep_embeddings",
    "retro_query_ef_search": "ef_search",
    "retro_query_nprobe": "nprobe",
    "retro_query_num_neighbors_query": "num_neighbors_query",
    "retro_query_num_neighbors_save": "num_neighbors_save",
    "retro_gpt_data_cache_path": "leave it out: nothing is cached beside the project directory",
    "retro_gpt_split": (
        "write --valid_fraction 0.03 for 97 to 3: validation documents are drawn at random, and are in no database"
    ),
    "retro_gpt_train_samples": _OF_TRAINING,
    "retro_gpt_eval_interval": _OF_TRAINING,
    "retro_gpt_eval_iters": _OF_TRAINING,
    "retro_gpt_seq_length": _OF_TRAINING,
    "retro_gpt_global_batch_size": _OF_TRAINING,
    "retro_gpt_tokenizer_type": "leave it out: --tokenizer takes a .model, a tokenizer.json or their folder",
    "retro_gpt_vocab_file": "give --tokenizer, a tokenizer.json, which holds vocabulary and merges",
    "retro_gpt_merge_file": "give --tokenizer, a tokenizer.json, which holds vocabulary and merges",
    "retro_bert_tokenizer_type": _EMBEDDER,
    "retro_bert_vocab_file": _EMBEDDER,
    "retro_bert_batch_size": "write --batch_tokens: tokens of a forward pass, whatever the texts' lengths",
    "bert_embedder_type": _EMBEDDER,
    "bert_load": "give the encoder as a Hugging Face directory with --embedder",
    "retro_index_type": "leave it out: the processes of a job share the work, and the index does not depend on them",
    "retro_index_nfeats": "leave it out: the embedder says how many channels its vectors have",
    "retro_return_doc_ids": "leave it out: documents are always known",
}
"""By option, with underscores: the name of a setting, or a sentence."""
