//! Pieces against wholes.

use proptest::prelude::*;

use super::*;

/// Tokens of arbitrary bytes, many of them parts of code points.
fn vocabulary() -> Arc<Vocabulary> {
    let words: [&[u8]; 4] = ["hé".as_bytes(), "€".as_bytes(), b"STOP", b"<end>"];
    let tokens = (0..=255u8).map(|byte| (vec![byte], false));
    Arc::new(Vocabulary::new(tokens.chain(words.iter().map(|word| (word.to_vec(), word[0] == b'<'))), false))
}

fn stream(stops: &[&str]) -> TextStream {
    let strings = stops.iter().map(|stop| stop.to_string()).collect();
    TextStream::new(Detokenizer::new(vocabulary(), true), Stops { strings, ..Stops::default() })
}

/// All text of `tokens`, and the stop string that ended it.
fn run(mut stream: TextStream, tokens: &[u32]) -> (String, Option<String>) {
    let mut text = String::new();
    for token in tokens {
        let delta = stream.push(*token);
        text.push_str(&delta.text);
        if delta.stopped.is_some() {
            return (text, delta.stopped);
        }
    }
    let delta = stream.finish();
    (text + &delta.text, delta.stopped)
}

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

proptest! {
    #[test]
    fn pieces_add_up_to_the_whole(tokens in prop::collection::vec(0u32..270, 0..60)) {
        let vocabulary = vocabulary();
        let whole: Vec<u8> = tokens
            .iter()
            .filter(|token| !vocabulary.is_special(**token))
            .flat_map(|token| vocabulary.bytes(*token).to_vec())
            .collect();
        let (text, stopped) = run(stream(&[]), &tokens);
        prop_assert_eq!(&text, &String::from_utf8_lossy(&whole));
        prop_assert_eq!(text, vocabulary.decode(&tokens, true));
        prop_assert_eq!(stopped, None);
    }

    #[test]
    fn real_text_is_never_split(text in "\\PC{0,20}") {
        let mut detokenizer = Detokenizer::new(vocabulary(), true);
        for token in bytes(&text) {
            let damaged = detokenizer.push(token).contains(char::REPLACEMENT_CHARACTER);
            prop_assert!(!damaged || text.contains(char::REPLACEMENT_CHARACTER));
        }
        prop_assert_eq!(detokenizer.finish(), "");
    }

    #[test]
    fn stops_do_not_depend_on_token_borders(
        text in "[abc€]{0,24}",
        stops in prop::collection::vec("[abc€]{1,4}", 1..4),
    ) {
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        // The obvious way: the first position at which some stop string is complete.
        let expected = (0..=text.len()).filter(|end| text.is_char_boundary(*end)).find_map(|end| {
            let ending = stops.iter().filter(|stop| text[..end].ends_with(**stop));
            let longest = ending.max_by_key(|stop| stop.len())?;
            Some((text[..end - longest.len()].to_owned(), Some(longest.to_string())))
        });
        let expected = expected.unwrap_or((text.clone(), None));
        prop_assert_eq!(&run(stream(&stops), &bytes(&text)), &expected);
        // As one token.
        let vocabulary = Arc::new(Vocabulary::new([(text.clone().into_bytes(), false)], false));
        let strings = stops.iter().map(|stop| stop.to_string()).collect();
        let stops = Stops { strings, ..Stops::default() };
        let whole = TextStream::new(Detokenizer::new(vocabulary, true), stops);
        prop_assert_eq!(&run(whole, &[0]), &expected);
    }
}

#[test]
fn a_code_point_waits_for_its_last_byte() {
    let mut detokenizer = Detokenizer::new(vocabulary(), true);
    assert_eq!(detokenizer.push(0xf0), "");
    assert_eq!(detokenizer.push(0x9f), "");
    assert_eq!(detokenizer.push(0x98), "");
    assert_eq!(detokenizer.push(0x80), "😀");
    assert_eq!(detokenizer.push(0xe2), "");
    assert_eq!(detokenizer.push(u32::from(b'x')), "\u{fffd}x");
    assert_eq!(detokenizer.push(0xc3), "");
    assert_eq!(detokenizer.finish(), "\u{fffd}");
    assert_eq!(detokenizer.finish(), "");
}

#[test]
fn text_is_held_only_while_it_may_become_a_stop_string() {
    let mut stream = stream(&["\n\nQ:"]);
    assert_eq!(stream.push(u32::from(b'a')).text, "a");
    assert_eq!(stream.push(u32::from(b'\n')).text, "");
    assert_eq!(stream.offset(), 2);
    assert_eq!(stream.push(u32::from(b'b')).text, "\nb");
    for byte in *b"\n\nQ" {
        assert_eq!(stream.push(u32::from(byte)), Delta::default());
    }
    let end = stream.push(u32::from(b':'));
    assert_eq!(end, Delta { text: String::new(), stopped: Some("\n\nQ:".into()) });
}

#[test]
fn held_text_is_released_at_the_end() {
    let mut stream = stream(&["STOPPED"]);
    assert_eq!(stream.push(258).text, "");
    assert_eq!(stream.finish(), Delta { text: "STOP".into(), stopped: None });
}

#[test]
fn stops_may_stay_in_the_text_and_wait_for_the_minimum() {
    let stops = Stops { strings: vec!["b".into()], include: true, min_tokens: 3 };
    let stream = TextStream::new(Detokenizer::new(vocabulary(), true), stops);
    assert_eq!(run(stream, &bytes("abab!")), ("abab".into(), Some("b".into())));
}

#[test]
fn special_tokens_are_shown_on_request_only() {
    let vocabulary = vocabulary();
    assert_eq!(vocabulary.decode(&[256, 259], true), "hé");
    assert_eq!(vocabulary.decode(&[256, 259], false), "hé<end>");
    assert_eq!(vocabulary.piece(0xc3), "\u{fffd}");
    assert_eq!(vocabulary.piece(99_999), "\u{fffd}");
    assert!(!vocabulary.is_special(99_999));
    let spaced = Vocabulary::new([(b" a".to_vec(), false)], true);
    assert_eq!(spaced.decode(&[0, 0], true), "a a");
}
