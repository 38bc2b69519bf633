//! The limits of templates, against the longest chats that there are.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;

use super::*;

/// Messages of the longest request (`http::chat`), less one: a question is the first and the last.
const MESSAGES: usize = 4095;

/// Tools of an agent that has everything.
const TOOLS: usize = 128;

/// Templates of published models, by the first fixture that has each.
fn templates() -> BTreeMap<String, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/templates");
    let mut known: BTreeMap<String, String> = BTreeMap::new();
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    for path in files {
        let case: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        known.entry(case["template"].as_str().unwrap().to_owned()).or_insert(name);
    }
    known.into_iter().map(|(source, name)| (name, source)).collect()
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// `count` messages that are answered in turns, the last of them a question.
fn talk(count: usize, answer: &Value) -> Vec<Value> {
    let question = message("user", "And what happened to the fox after that, was it ever seen again?");
    let turns = (1..count).map(|at| if at % 2 == count % 2 { question.clone() } else { answer.clone() });
    turns.chain([question.clone()]).collect()
}

/// One question, and `count - 1` messages of an agent that calls tools for it.
fn agent(count: usize) -> Vec<Value> {
    let call = json!({"id": "call00001", "type": "function", "function": {"name": "look_up",
        "arguments": {"query": "fox", "limit": 10, "fields": ["name", "place", "time"]}}});
    let asks = json!({"role": "assistant", "content": "", "tool_calls": [call, call]});
    let says = json!({"role": "tool", "tool_call_id": "call00001", "name": "look_up",
        "content": "{\"found\": [\"a fox\", \"another fox\"], \"more\": false}"});
    let steps = [asks, says.clone(), says].into_iter().cycle().take(count - 1);
    std::iter::once(message("user", "Find every fox.")).chain(steps).collect()
}

fn tools() -> Value {
    let property =
        json!({"type": "string", "description": "What is looked for, in words.", "enum": ["a", "b"]});
    let properties: Map<String, Value> = (0..8).map(|at| (format!("field_{at}"), property.clone())).collect();
    let tool = json!({"type": "function", "function": {"name": "look_up", "description": "Looks things up.",
        "parameters": {"type": "object", "properties": properties, "required": ["field_0"]}}});
    vec![tool; TOOLS].into()
}

/// Chats of so many messages, of each kind that people and programs have, by name.
fn chats(count: usize) -> Vec<(&'static str, Chat)> {
    let plain = message("assistant", "It was seen by the river, twice, and then no more.");
    let mut thought = message("assistant", "<think>\nThe river.\nOr the hill.\n</think>\n\nBy the river.");
    let inside = talk(count, &thought);
    thought["reasoning_content"] = "The river.\nOr the hill.".into();
    let parts = json!({"role": "assistant", "content": [{"type": "text", "text": "By the river."}]});
    let system = [message("system", "Be brief.")].into_iter().chain(talk(count - 2, &plain)).collect();
    let with_tools =
        |messages| Chat { variables: Map::from_iter([("tools".into(), tools())]), ..Chat::new(messages) };
    vec![
        ("plain", Chat::new(talk(count, &plain))),
        ("system", Chat::new(system)),
        ("thoughts inside", Chat::new(inside)),
        ("thoughts beside", Chat::new(talk(count, &thought))),
        ("parts", Chat::new(talk(count, &parts))),
        ("tools", with_tools(talk(count, &plain))),
        ("agent", with_tools(agent(count))),
    ]
}

/// Fuel that rendering takes, and bytes.
fn spent(template: &ChatTemplate, chat: &Chat) -> Result<(u64, usize), TemplateError> {
    with_stack(|| {
        let wrong = |error: Error| TemplateError(describe(&error));
        let compiled = template.environment.get_template("chat").map_err(wrong)?;
        let mut output = Bounded { bytes: Vec::new(), max: OUTPUT_BYTES_MAX };
        let marks = [("bos_token", "<s>"), ("eos_token", "</s>")];
        let marks = marks.map(|(name, text)| (name.to_owned(), Value::from(text)));
        let variables = variables(chat, &SpecialTokens(Map::from_iter(marks)));
        let captured = compiled.render_captured_to(Serde(&variables), &mut output).map_err(wrong)?;
        let (spent, _) = captured.state().fuel_levels().unwrap();
        Ok((spent, output.bytes.len()))
    })
}

#[test]
fn the_longest_chats_of_every_kind_take_half_of_the_fuel_at_most() {
    let templates = templates();
    assert!(templates.len() >= 15, "{templates:?}");
    for (name, source) in &templates {
        let template = ChatTemplate::new(source).unwrap();
        let mut taken = 0;
        for ((kind, short), (_, long)) in chats(9).into_iter().zip(chats(MESSAGES)) {
            // Some have no such messages, and say so.
            if spent(&template, &short).is_err() {
                continue;
            }
            taken += 1;
            let (spent, _) =
                spent(&template, &long).unwrap_or_else(|error| panic!("{name}, {kind}: {error}"));
            assert!(spent <= FUEL / 2, "{name}, {kind}: {spent} instructions");
        }
        assert!(taken > 0, "{name} takes no chat");
    }
}
