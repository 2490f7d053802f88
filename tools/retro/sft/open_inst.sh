# InstructRetro's blend of instructions (arXiv 2310.07713), by the share of the samples that each data set has: 128,000
# in 1,000 steps of 128. sft_retro_lm.sh reads this file and runs nothing of it.
DATA_BLEND="0.02 soda 0.02 eli5 0.01 self_instruct_short 0.02 self_instruct_long 0.02 unnatural 0.01 flan_cot
    0.05 dolly 0.817 oasst-noncode 0.033 oasst-code"
