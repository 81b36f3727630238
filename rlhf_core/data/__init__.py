"""The data stage: sources of any shape -> rows of prompt, answer and pair -> shares by prompt -> token ids on disk.

`readers` opens files and data sets, `formats` makes an `Example` of a row, `template` turns messages into text,
`split` decides which stage a prompt belongs to, `tokenizer` settles pad, EOS and vocabulary, `encode` makes token
ids, `sample` draws preference pairs from a model, `tables` writes Arrow, and `build` is the stage itself: read it
first. Nothing here imports torch, except `sample` when pairs are sampled.
"""
