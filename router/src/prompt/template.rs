//! Chat templates, rendered as transformers renders them.
//!
//! Problem: templates are Jinja2 written for Python, and one space too many changes what the model says. Idea:
//! minijinja with Python's string methods, transformers' block trimming, its `tojson`, `raise_exception` and
//! `strftime_now`, Python's spelling of floats, and its clean-up of messages (keys with null are dropped,
//! reasoning is known under all its names). Golden files rendered by transformers guard it. Price: a template
//! that needs more of Python than that fails with minijinja's message.
//!
//! Templates come with models and are not trusted: source, instructions, recursion and output are bounded, and there is
//! no loader, so nothing can be included. What is nested deeply, in the source or in a value, takes stack, which a
//! thread of its own has: a stack that overflows ends the process. Not bounded is what one instruction may do: minijinja
//! lets a string be repeated to 100 MB, and joined to itself as often as it fits in memory. So a model's template is to
//! be trusted as far as its weights are.

mod python;

use std::time::UNIX_EPOCH;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior};
use model::json::shown;
use serde_json::{Map, Value};

use super::Chat;
use super::files::SpecialTokens;

/// Used where a model has no template: the most widely known format.
pub(super) const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
     message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
     {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Source bytes at most: ten times the longest of a published model.
const SOURCE_BYTES_MAX: usize = 256 << 10;
/// Template instructions per rendering: a tenth of a second of work. A long chat takes some ten thousand; one of as many
/// messages as a request may have takes half a million at most with the templates of published models (`tests`).
const FUEL: u64 = 2_000_000;
/// Stack of compiling and rendering. Operators in a row (`not not ...`) and lists in lists take a frame each, to read, to
/// print and to free: as many as the source has bytes, or as a fifth of the instructions. It is address space for as long as
/// one rendering takes, of which there are four at a time (`http`); memory is only what is used of it, and goes with it.
const STACK_BYTES: usize = 512 << 20;
/// Nested calls, loops and blocks; real templates stay below 20. Rendering threads have 2 MB of stack.
const RECURSION_MAX: usize = 200;
/// Rendered bytes at most: four times the largest request body.
const OUTPUT_BYTES_MAX: usize = 8 << 20;

/// What one rendering may take. Requests have the default; whoever tries a million templates gives each less.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Template instructions.
    pub instructions: u64,
    /// Bytes of what is rendered, and of the JSON that is made on the way.
    pub output_bytes: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { instructions: FUEL, output_bytes: OUTPUT_BYTES_MAX }
    }
}

/// The variable in which `strftime_now` finds the time.
const NOW: &str = "__now_seconds";

/// Names of a message's reasoning; the first is the standard one.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A chat the template does not take, in its words or minijinja's.
#[derive(Debug, thiserror::Error)]
#[error("{}", shown(.0))]
pub struct TemplateError(pub String);

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    limits: Limits,
}

impl ChatTemplate {
    /// Compiles `source`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(source: &str) -> Result<ChatTemplate, TemplateError> {
        ChatTemplate::within(source, Limits::default())
    }

    /// As `new`, with other limits.
    ///
    /// # Errors
    /// What is wrong with the source.
    pub fn within(source: &str, limits: Limits) -> Result<ChatTemplate, TemplateError> {
        if source.len() > SOURCE_BYTES_MAX {
            let bytes = source.len();
            return Err(TemplateError(format!("{bytes} bytes long; at most {SOURCE_BYTES_MAX} are read")));
        }
        with_stack(|| ChatTemplate::compile(source, limits))
    }

    fn compile(source: &str, limits: Limits) -> Result<ChatTemplate, TemplateError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| TemplateError(describe(&error)))?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(limits.instructions));
        environment.set_recursion_limit(RECURSION_MAX);
        environment.set_unknown_method_callback(python::method);
        environment.set_formatter(|output, state, value| match value.kind() {
            ValueKind::Number if !value.is_integer() => {
                let text = f64::try_from(value.clone()).map(python::float)?;
                Ok(std::fmt::Write::write_str(output, &text)?)
            }
            _ => minijinja::escape_formatter(output, state, value),
        });
        environment.add_filter("tojson", move |state: &mut State<'_, '_>, value: &Jinja, kwargs: Kwargs| {
            json_style(&kwargs)?.json(state, value, limits.output_bytes)
        });
        environment.add_function("raise_exception", |message: String| -> Result<Jinja, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |state: &State<'_, '_>, format: String| {
            let seconds = state.lookup(NOW).and_then(|now| i64::try_from(now).ok()).unwrap_or(0);
            python::strftime(&format, seconds)
        });
        environment
            .add_template_owned("chat", without_generation_tags(source))
            .map_err(|error| TemplateError(describe(&error)))?;
        Ok(ChatTemplate { environment, source: source.to_owned(), limits })
    }

    /// What it was compiled from.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The conversation as text.
    pub fn render(&self, chat: &Chat, special: &SpecialTokens) -> Result<String, TemplateError> {
        with_stack(|| self.rendered(chat, special))
    }

    fn rendered(&self, chat: &Chat, special: &SpecialTokens) -> Result<String, TemplateError> {
        if chat.messages.is_empty() {
            return Err(TemplateError("the conversation is empty; send at least one message".into()));
        }
        let template = self.environment.get_template("chat");
        let template = template.map_err(|error| TemplateError(describe(&error)))?;
        let mut output = Bounded { bytes: Vec::new(), max: self.limits.output_bytes };
        template
            .render_captured_to(Serde(&variables(chat, special)), &mut output)
            .map_err(|error| TemplateError(describe(&error)))?;
        String::from_utf8(output.bytes).map_err(|error| TemplateError(error.to_string()))
    }
}

/// What the template finds by name.
fn variables(chat: &Chat, special: &SpecialTokens) -> Map<String, Value> {
    let seconds = chat.now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let mut variables = special.0.clone();
    variables.extend(chat.variables.clone());
    // Defined but none unless given, as in transformers.
    variables.entry("tools").or_insert(Value::Null);
    variables.entry("documents").or_insert(Value::Null);
    variables.insert("messages".into(), chat.messages.iter().map(as_transformers).collect());
    variables.insert("add_generation_prompt".into(), Value::Bool(chat.add_generation_prompt));
    variables.insert(NOW.into(), Value::from(seconds));
    variables
}

/// Does the work on a thread with `STACK_BYTES`; the price is some tens of microseconds.
fn with_stack<T: Send>(work: impl FnOnce() -> Result<T, TemplateError> + Send) -> Result<T, TemplateError> {
    let failed = |what: &dyn std::fmt::Display| TemplateError(format!("the chat template's thread: {what}"));
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("template".into()).stack_size(STACK_BYTES);
        let thread = thread.spawn_scoped(scope, work).map_err(|error| failed(&error))?;
        thread.join().unwrap_or_else(|_| Err(failed(&"it panicked; its message says why")))
    })
}

/// The error's own words and those of its causes, without the source dump.
fn describe(error: &Error) -> String {
    let mut text = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    match error.line() {
        Some(line) => format!("{text} (line {line} of the chat template)"),
        None => text,
    }
}

/// A message as transformers hands it to the template: keys with null dropped, reasoning under all its names.
fn as_transformers(message: &Value) -> Value {
    let Value::Object(fields) = message else { return message.clone() };
    let mut kept: Map<String, Value> = Map::new();
    let present = fields.iter().filter(|(_, value)| !value.is_null());
    let reasoning = REASONING.iter().find_map(|name| fields.get(*name).filter(|value| !value.is_null()));
    if let Some(reasoning) = reasoning {
        kept.insert("thinking".into(), reasoning.clone());
        kept.extend(present.map(|(name, value)| (name.clone(), value.clone())));
        kept.insert("reasoning_content".into(), reasoning.clone());
    } else {
        kept.extend(present.map(|(name, value)| (name.clone(), value.clone())));
    }
    Value::Object(kept)
}

/// Grows to `max` and no further.
struct Bounded {
    bytes: Vec<u8>,
    max: usize,
}

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.max {
            return Err(std::io::Error::other(format!(
                "the rendered chat exceeds {} bytes; shorten the conversation",
                self.max
            )));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Replaces transformers' `{% generation %}` tags, which mark answers for training, by tags that do nothing.
/// Trim marks stay, so white space is treated the same.
fn without_generation_tags(source: &str) -> String {
    let mut output = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        let Some(length) = tag.find("%}") else { break };
        let (inside, after) = tag.split_at(length);
        let word = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match word {
            "generation" => Some(inside.replace("generation", "if true")),
            "endgeneration" => Some(inside.replace("endgeneration", "endif")),
            _ => None,
        };
        output.push_str(before);
        rest = match replacement {
            Some(inside) => {
                output.push_str(&inside);
                after
            }
            None => tag,
        };
    }
    output.push_str(rest);
    output
}

/// Arguments of transformers' `tojson`: Python's `json.dumps(x, ensure_ascii=False, indent, separators, sort_keys)`.
fn json_style(kwargs: &Kwargs) -> Result<python::JsonStyle, Error> {
    let separators: Option<Jinja> = kwargs.get("separators")?;
    let indent: Option<Jinja> = kwargs.get("indent")?;
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(indent)?.min(64)),
        }),
    };
    let (mut item, mut key) = (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
    if let Some(separators) = separators.filter(|separators| !separators.is_none()) {
        item = separators.get_item_by_index(0)?.to_string();
        key = separators.get_item_by_index(1)?.to_string();
    }
    let style = python::JsonStyle {
        ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        item,
        key,
    };
    kwargs.assert_all_used()?;
    Ok(style)
}

#[cfg(test)]
mod tests;
