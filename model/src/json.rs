//! JSON from strangers: a document in which no object has a key twice.
//!
//! Two readers of one file must not see two models, and `serde_json` keeps the last of equal keys in silence.
//! This reads into the same `serde_json::Value`, refusing repeated keys at every depth; nesting is limited by
//! `serde_json` itself (128 levels). It refuses nothing else: meaning is for the caller. What a stranger wrote ends up in
//! messages, and messages on terminals: `shown` makes them harmless there.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Parses `text`; the error names the line, or the key that appears twice.
pub fn parse(text: &[u8]) -> Result<Value, serde_json::Error> {
    serde_json::from_slice::<Unique>(text).map(|unique| unique.0)
}

/// Characters of a message at most: some lines of a terminal. What is cut was written by a stranger at length.
const SHOWN_MAX: usize = 2000;

/// A message as a terminal may have it: control characters escaped, cut after some lines. Harmless ones stay as they are.
pub fn shown(message: &str) -> String {
    let mut text = String::with_capacity(message.len().min(SHOWN_MAX));
    for (count, letter) in message.chars().enumerate() {
        match letter {
            _ if count == SHOWN_MAX => {
                text.push_str("...");
                break;
            }
            letter if letter.is_control() => text.extend(letter.escape_default()),
            letter => text.push(letter),
        }
    }
    text
}

struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Unique, D::Error> {
        deserializer.deserialize_any(UniqueVisitor)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Unique;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Unique, E> {
        Ok(Unique(Value::Bool(value)))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Unique, E> {
        Ok(Unique(value.into()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Unique, E> {
        Ok(Unique(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Unique, E> {
        Ok(Unique(value.into()))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Unique, E> {
        Ok(Unique(value.into()))
    }

    fn visit_unit<E: Error>(self) -> Result<Unique, E> {
        Ok(Unique(Value::Null))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Unique, A::Error> {
        let mut all = Vec::new();
        while let Some(Unique(item)) = items.next_element()? {
            all.push(item);
        }
        Ok(Unique(Value::Array(all)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Unique, A::Error> {
        let mut all = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let Unique(value) = entries.next_value()?;
            if all.contains_key(&key) {
                return Err(A::Error::custom(format!("key '{}' appears twice", key.escape_debug())));
            }
            all.insert(key, value);
        }
        Ok(Unique(Value::Object(all)))
    }
}

#[cfg(test)]
mod tests {
    use super::{SHOWN_MAX, parse, shown};

    #[test]
    fn messages_do_nothing_to_terminals_and_are_cut() {
        let escaped = "tensor 'é' is missing\\n\\u{1b}[2J\\u{9b}31m";
        assert_eq!(shown("tensor 'é' is missing\n\u{1b}[2J\u{9b}31m"), escaped);
        assert_eq!(shown(escaped), escaped);
        let long = "ä".repeat(SHOWN_MAX);
        assert_eq!((shown(&long), shown(&(long.clone() + "ä"))), (long.clone(), long + "..."));
    }

    #[test]
    fn equal_keys_are_refused_at_every_depth() {
        assert!(parse(br#"{"a": 1, "b": [{"c": null}], "d": -1.5}"#).is_ok());
        for text in [r#"{"a": 1, "a": 1}"#, r#"[{"b": {"a": 1, "c": 2, "a": 3}}]"#] {
            let message = parse(text.as_bytes()).unwrap_err().to_string();
            assert!(message.contains("key 'a' appears twice"), "{message}");
        }
    }

    #[test]
    fn depth_is_limited() {
        assert!(parse("[".repeat(100_000).as_bytes()).is_err());
    }
}
