"""The chat format of the release as a jinja template, for transformers and servers that read `tokenizer_config.json`.

It renders what `persimmon.chat.render` returns, byte for byte, with `bos_token` in front where that is set
(transformers sets it and reads it as the one leading end-of-text id; it adds none itself to a rendered chat).
Every tag trims the whitespace on both sides, so that the text is the same whatever the environment's own settings.
"""

from __future__ import annotations

USER = "human:"
ASSISTANT = "adept:"
TURN = "\n\n"
"""Stands in front of every turn but the first."""

CHAT_TEMPLATE = """\
{%- if not messages -%}{{- raise_exception('a conversation needs at least one message') -}}{%- endif -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] | trim -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}
  {%- set turns = messages -%}
{%- endif -%}
{%- if not turns -%}{{- raise_exception('a conversation needs a user message') -}}{%- endif -%}
{{- bos_token -}}
{%- for message in turns -%}
  {%- set expected = 'assistant' if loop.index0 % 2 else 'user' -%}
  {%- if message['role'] != expected -%}
    {{- raise_exception('user and assistant messages must alternate, beginning with the user') -}}
  {%- endif -%}
  {%- set content = message['content'] | trim -%}
  {%- if loop.first and system -%}{%- set content = (system + '\\n\\n' + content) | trim -%}{%- endif -%}
  {{- '' if loop.first else '\\n\\n' -}}
  {{- 'adept:' if loop.index0 % 2 else 'human:' -}}
  {{- ' ' + content if content else '' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- if turns[-1]['role'] != 'user' -%}{{- raise_exception('an answer needs a user message before it') -}}{%- endif -%}
  {{- '\\n\\nadept:' -}}
{%- endif -%}
"""
