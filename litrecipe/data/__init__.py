"""Text in, samples out: readers, formats, chat templates, tokenizer, tokenised samples, packing."""
