"""The conversation behind `persimmon chat`, on a terminal and on a pipe.

`conversation`, `attachments`, `settings`, `storage`, `dialogue`, `commands`, `blocks` and `gauge` know no terminal;
`markdown`, `painter` and `view` draw; `keyboard` reads; `session` and `pipe` tie them together.
"""
