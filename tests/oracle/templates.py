"""Chat templates rendered by transformers' own code, one JSON file per case.

A case is {template, messages, tools, kwargs, rendered} or, where the template itself refuses,
{template, messages, tools, kwargs, error}. `kwargs` are the variables the template sees beside messages and tools
(add_generation_prompt, bos_token, eos_token, enable_thinking, ...). The templates are written here, in the manner of
those that real checkpoints carry, to use every construct that those use: block trimming, loop controls, namespaces,
Python string and dict methods, macros, slices, tojson, tests and filters.
"""

import json

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

TALK = [
    {"role": "system", "content": "You tell stories."},
    {"role": "user", "content": "  A fox met a hare.\n"},
    {"role": "assistant", "content": "They went home together. "},
    {"role": "user", "content": "And then?  “Yes” & <no> 'maybe' \"so\" 🦊"},
]
NO_SYSTEM = TALK[1:]
ONE = [{"role": "user", "content": "hi"}]
WITH_NAMES = [
    {"role": "user", "name": "Anne", "content": "Hello."},
    {"role": "assistant", "content": "Hello, Anne."},
    {"role": "user", "content": ""},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "text", "text": "a fox."}]},
    {"role": "assistant", "content": "I see it."},
]
THOUGHTS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\nIt is 4."},
    {"role": "user", "content": "and 3+3?"},
    {"role": "assistant", "reasoning_content": "three twice", "content": "6"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Today's weather; \"é\" <b>",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
                "required": ["city"],
            },
        },
    }
]
TOOL_TALK = [
    {"role": "user", "content": "Weather in Łódź?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Łódź", "days": 2}}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": '{"sky": "grey", "t": 3.5}'},
    {"role": "tool", "tool_call_id": "c2", "content": "rain"},
]

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Llama 2 and the first Mixtral: strict alternation, system text inside the first turn.
INST = """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system_message = messages[0]['content'] %}
{% else %}
    {% set loop_messages = messages %}
    {% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 and system_message != false %}
        {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
    {% elif message['role'] == 'assistant' %}
        {{- ' ' + content.strip() + ' ' + eos_token -}}
    {% endif %}
{% endfor %}"""

# Mixtral Instruct as shipped later: bos once, namespace counting turns, messages filtered by selectattr.
INST_NAMESPACE = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0, last=none) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
        {%- set ns.last = message.role %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, not " ~ message["role"]) }}
    {%- endif %}
{%- endfor %}
{{- ns.last|default("nobody", true)|upper ~ ":" ~ ns.index }}
"""

# Qwen3: tools in the system turn, thoughts cut out of earlier turns, reversed scan for the last question.
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\nYou may call one or more functions.\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

# OLMoE and Tulu: role markers, eos only after finished answers, generation prompt inside the loop.
OLMOE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + "
    "message['content'] + '\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\n' + message['content'] + "
    "eos_token + '\n' }}{% else %}{{ '<|assistant|>\n' + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)

# Qwen1.5: a default system turn where there is none.
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content']}}{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\n'}}"
    "{% endif %}{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Block trimming: what trim_blocks and lstrip_blocks do to lines of their own, to text after blocks, to comments.
TRIM = """start
  {% for message in messages %}
    * {{ message.role }}:   {{ message.content | trim }}
      {# a comment on a line of its own #}
    {%- if not loop.last %}

    next
    {% endif %}
	{% if loop.first %}	tab kept after the block{% endif %}

  {% endfor +%}
  {%+ if true %}indent kept{% endif %}

end
"""

LOOP_CONTROLS = """{%- for message in messages -%}
  {%- if message.role == 'system' %}{% continue %}{% endif -%}
  {{ loop.index }}/{{ loop.length }} {{ loop.revindex }} {{ loop.cycle('odd', 'even') }} {{ message.role }}
  {%- if loop.previtem is defined %} after {{ loop.previtem.role }}{% endif %}
  {%- if loop.nextitem is defined %} before {{ loop.nextitem.role }}{% endif %};
  {%- if message.role == 'assistant' %}{% break %}{% endif -%}
{%- else -%}
  nothing
{%- endfor -%}"""

MACROS = """{%- macro turn(role, content, mark='#') -%}
{{ mark ~ ' ' ~ role | capitalize }}: {{ content | trim }}
{%- endmacro -%}
{%- macro quote(lines) -%}
{%- for line in lines -%}> {{ line }}{{ '\\n' if not loop.last }}{%- endfor -%}
{%- endmacro -%}
{%- for message in messages -%}
{{ turn(message.role, message.content) if loop.first else turn(message.role, message.content, mark='##') }}
{{ quote(message.content.split('\\n')) }}
{% endfor -%}
{%- call(text) wrapped() -%}<{{ text }}>{%- endcall -%}"""
MACROS = MACROS.replace("{%- macro turn", "{%- macro wrapped() -%}[{{ caller('in') }}]{%- endmacro -%}\n{%- macro turn", 1)

STRING_METHODS = """{%- set text = messages[-1].content -%}
{{ text.strip() }}|{{ text.lstrip() }}|{{ text.rstrip('?. ') }}|{{ text.upper() }}|{{ text.lower() }}|{{ text.title() }}
{{ text.split() | join(',') }}|{{ text.split('n', 1) | tojson }}|{{ text.replace('n', 'N') }}|{{ text.startswith('And') | tojson }}
{{ text.endswith('n ') | tojson }}|{{ text.find('then') }}|{{ text.count('e') }}|{{ 'a-b-c'.rsplit('-', 1)[0] }}
{{ '\\n'.join(['x', 'y']) }}|{{ ' x '.strip() | length }}|{{ 'abc'[::-1] }}|{{ 'abcdef'[1:4] }}|{{ 'abcdef'[-2:] }}
{{ 'line one\\nline two'.splitlines() | tojson }}|{{ 'fox'.capitalize() }}|{{ 'x' * 3 }}|{{ '17'.isdigit() | tojson }}"""

DICT_METHODS = """{%- for message in messages -%}
{%- for key, value in message.items() -%}{{ key }}={{ value }};{%- endfor -%}
{{ message.get('name', 'nobody') }} {{ message.keys() | list | tojson }} {{ message.values() | join('/') }}
{%- if 'name' in message %} named{% endif %}{% if message.name is defined %} indeed{% endif %}
{% endfor -%}
{{ dict(a=1, b=2).items() | list | tojson }} {{ {'z': 1, 'a': 2} | dictsort | tojson }} {{ {'k': [1, 2.0, none, true]} | tojson }}"""

# What Python prints for values that are not strings.
PYTHON_REPR = """{{ true }} {{ false }} {{ none }} {{ 1.0 }} {{ 1e20 }} {{ [1, 'a', "it's", none, true] }} {{ {'k': 'v', 'n': 2.5} }}
{{ 'a' ~ 1 ~ true ~ none }} {{ messages[0] }} {{ [] }} {{ {} }} {{ ['é', '\\n'] }} {{ (messages | length) == 1 }}"""

TOJSON = """{{ messages | tojson }}
{{ tools | tojson(indent=2) }}
{{ tools[0].function.parameters | tojson(indent=4) }}
{{ {'b': 1, 'a': 'é<>&\\'', 'f': 1.0, 'g': 1e-7, 'h': 1e16, 'n': none, 't': true, 'e': [], 'o': {}} | tojson }}"""

TESTS_AND_FILTERS = """{%- set ns = namespace(found=false, seen=[]) -%}
{%- macro yes(x) -%}{{ 'y' if x else 'n' }}{%- endmacro -%}
{%- for m in messages | selectattr('role', 'equalto', 'user') | list -%}{{ loop.index }}:{{ m.content | trim | length }} {% endfor %}
{{ messages | map(attribute='role') | join(', ') }}|{{ messages | rejectattr('role', 'equalto', 'user') | list | length }}
{{ yes(missing is defined) }} {{ yes(missing is not defined) }} {{ missing | default('none') }} {{ '' | default('empty', true) }}
{{ yes(messages is iterable) }}{{ yes(messages is sequence) }}{{ yes(messages is mapping) }}{{ yes(messages[0] is mapping) }}
{{ yes('x' is string) }}{{ yes(3 is number) }}{{ yes(none is none) }}{{ yes(true is boolean) }}{{ yes(4 is even) }}{{ yes(false is true) }}
{{ 7 // 2 }} {{ 7 % 3 }} {{ 2 ** 3 }} {{ 7 / 2 }} {{ 1.5 + 1 }} {{ -3 | abs }} {{ yes(3 == 3.0) }} {{ 'a' ~ 1 }} {{ -7 // 2 }} {{ -7 % 3 }}
{{ messages[0].content if messages[0].role == 'system' else 'no system' }} {{ 'x' if false }}|{{ missing }}|{{ messages[0].missing }}
{{ range(3) | list | tojson }} {{ [3, 1, 2] | sort | tojson }} {{ [1, 2, 3] | first }} {{ [1, 2, 3] | last }} {{ (['a', 'b'] + ['c']) | tojson }}
{%- set ns.found = true %}
{{ yes(ns.found) }} {{ yes(true and not false or none) }} {{ yes('ell' in 'hello') }} {{ yes(4 not in [1, 2]) }} {{ ['a', 'b', 'a'] | unique | join }}
{% set block %}captured {{ messages | length }}{% endset %}{{ block }} {{ '<b>' | e }} {{ 'a b' | replace('a', 'c') | upper }} {{ 3.7 | int }} {{ '12' | int + 1 }}
{% raw %}{{ not a variable }}{% endraw %} {{ "a\\tb" }} {{ 'it\\'s' }} {% with a = 1, b = 2 %}{{ a + b }}{% endwith %} {% filter upper %}loud{% endfilter %}"""

PARTS_TEMPLATE = """{%- for message in messages -%}
<|{{ message.role }}|>
{%- if message.content is string -%}{{ message.content }}
{%- else -%}{%- for part in message.content if part.type == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}{{ eos_token }}
{%- endfor -%}"""

# Templates made for training mark what the assistant said; rendering ignores the mark.
GENERATION = """{%- for message in messages -%}
{{ '<|' + message.role + '|>' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- else %}{{ message.content }}{% endif -%}
{%- endfor -%}"""

# Gemma: roles renamed, system text refused. DeepSeek: flags carried through a namespace.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == "
    "'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + "
    "role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}"
)
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = "
    "namespace(is_first=false, is_tool=false, system_prompt='') %}{%- for message in messages %}{%- if message['role'] "
    "== 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}"
    "{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is "
    "not none %}{%- set content = message['content'] %}{% if '</think>' in content %}{% set content = "
    "content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}"
    "{%- endfor -%}{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)


def cases(tale):
    """(name, template, messages, tools, variables)."""
    marks = {"bos_token": "<s>", "eos_token": "</s>"}
    ask, answer = {"add_generation_prompt": True}, {"add_generation_prompt": False}
    return [
        ("tale-ask", tale, TALK, None, ask),
        ("tale-answer", tale, TALK, None, answer),
        ("tale-empty-content", tale, WITH_NAMES, None, ask),
        ("chatml-ask", CHATML, NO_SYSTEM, None, ask),
        ("chatml-one", CHATML, ONE, None, answer),
        ("inst-system", INST, TALK, None, ask | marks),
        ("inst-plain", INST, NO_SYSTEM, None, answer | marks),
        ("inst-refuses-order", INST, [TALK[2]], None, ask | marks),
        ("inst-namespace-system", INST_NAMESPACE, TALK, None, ask | marks),
        ("inst-namespace-plain", INST_NAMESPACE, NO_SYSTEM, None, ask | marks),
        ("inst-namespace-refuses-order", INST_NAMESPACE, [*ONE, *ONE], None, ask | marks),
        ("qwen3-ask", QWEN3, TALK, None, ask),
        ("qwen3-no-thinking", QWEN3, TALK, None, ask | {"enable_thinking": False}),
        ("qwen3-thinking", QWEN3, THOUGHTS, None, answer | {"enable_thinking": True}),
        ("qwen3-thinking-asked", QWEN3, THOUGHTS[:3], None, ask),
        ("qwen3-tools", QWEN3, TOOL_TALK, TOOLS, ask),
        ("qwen3-tools-system", QWEN3, TALK, TOOLS, ask),
        ("olmoe-ask", OLMOE, TALK, None, ask | {"bos_token": "|||IP_ADDRESS|||", "eos_token": "|||IP_ADDRESS|||"}),
        ("olmoe-answer", OLMOE, TALK[:3], None, answer | marks),
        ("qwen2-default-system", QWEN2, NO_SYSTEM, None, ask),
        ("qwen2-continues", QWEN2, TALK[:3], None, answer),
        ("trim", TRIM, TALK, None, answer),
        ("loop-controls", LOOP_CONTROLS, TALK, None, answer),
        ("loop-else", LOOP_CONTROLS.replace("in messages -%}", "in messages[9:] -%}", 1), ONE, None, answer),
        ("macros", MACROS, TALK, None, answer),
        ("string-methods", STRING_METHODS, TALK[:1] + [{"role": "user", "content": " And then? e n "}], None, answer),
        ("dict-methods", DICT_METHODS, WITH_NAMES, None, answer),
        ("tojson", TOJSON, TOOL_TALK, TOOLS, answer),
        ("tests-and-filters", TESTS_AND_FILTERS, TALK, None, answer),
        ("content-parts", PARTS_TEMPLATE, PARTS, None, answer | marks),
        ("generation-tag", GENERATION, NO_SYSTEM, None, answer | marks),
        ("python-repr", PYTHON_REPR, ONE, None, answer),
        ("gemma-ask", GEMMA, NO_SYSTEM, None, ask | marks),
        ("gemma-refuses-system", GEMMA, TALK, None, ask | marks),
        ("deepseek-ask", DEEPSEEK, TALK, None, ask | marks),
        ("deepseek-thoughts", DEEPSEEK, THOUGHTS[:3], None, ask | marks),
    ]


def make(root, fixtures, log):
    target = fixtures / "templates"
    target.mkdir(parents=True, exist_ok=True)
    for stale in target.glob("*.json"):
        stale.unlink()
    tale = (root / "models" / "tale-moe" / "chat_template.jinja").read_text(encoding="utf-8")
    for name, template, messages, tools, variables in cases(tale):
        case = {"template": template, "messages": messages, "tools": tools, "kwargs": variables}
        try:
            rendered, _ = render_jinja_template([messages], tools=tools, chat_template=template, **variables)
            case["rendered"] = rendered[0]
        except jinja2.exceptions.TemplateError as error:
            assert "refuses" in name, f"{name}: {error}"
            case["error"] = str(error)
        assert ("error" in case) == ("refuses" in name), name
        (target / f"{name}.json").write_text(json.dumps(case, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    log(f"templates: {len(cases(tale))} cases")
