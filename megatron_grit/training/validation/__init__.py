"""Loss on texts that are not trained on."""
