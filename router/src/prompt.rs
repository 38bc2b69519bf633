//! Text to tokens: tokenizer and chat template.
