"""The data stage: sources of any shape -> rows of prompt, answer and pair -> shares by prompt -> token ids on disk.

`files` and `readers` open files and data sets, `known` knows the columns of public sets by their names, `formats` makes
an `Example` of a row, `examples` joins the three. `template` turns messages into text, `chat_format` writes that down
for whoever talks to the model, `split` decides which stage a prompt belongs to (`digests` remembers it), `tokenizer`
settles pad, EOS and vocabulary, `encode` makes token ids (`plain`: of one text), `sample` draws preference pairs from a
model, `pretrain` cuts text to blocks, `tables` writes Arrow, and `build` is the stage itself: read it first. Nothing here
imports torch, except `sample` when pairs are sampled.
"""
