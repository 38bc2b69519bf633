//! Rules of single Rust files, and the little reading of Rust that they need.

use super::Complaint;

/// Lines of a file without its tests. Beyond that it is two files.
const FILE_LINES_MAX: usize = 800;
/// Where `unsafe` may stand: SIMD and FFI, and the one place that maps and shares memory.
const UNSAFE_PLACES: [&str; 2] = ["model/src/kernel/", "model/src/region.rs"];
/// Words that say nothing about a thing when they are its last.
const EMPTY_WORDS: [&str; 11] = [
    "manager", "handler", "util", "utils", "common", "helper", "helpers", "data", "info", "infos", "managers",
];
/// Names that traits of other crates give to what implements them.
const FOREIGN: [&str; 1] = ["handshake_data"];
/// Clock, chance and IO: arguments of the protocol, never its own doing.
const IMPURE: [&str; 10] = [
    "Instant",
    "SystemTime",
    "tokio",
    "quinn",
    "std::net::Tcp",
    "std::net::Udp",
    "std::fs",
    "std::thread",
    "std::env",
    "std::process",
];
const DECLARES: [&str; 6] = ["fn", "mod", "struct", "enum", "trait", "type"];

/// Whether a file holds nothing but tests.
pub(super) fn is_test_file(path: &str) -> bool {
    path.ends_with("/tests.rs")
        || path.contains("/tests/")
        || path.starts_with("tests/it/")
        || path.starts_with("tests/processes/")
        || path.starts_with("tests/sim/")
        || path.starts_with("tests/liar/")
}

/// Header, name and size of one file.
pub(super) fn check_file(path: &str, text: &str) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    if !text.starts_with("//! ") {
        complaints.push(format!("{path}: begin with a `//!` header: the problem, the idea, its price"));
    }
    if path.ends_with("/mod.rs") {
        complaints.push(format!("{path}: name it after its folder, beside it, instead of mod.rs"));
    }
    let code = code(text);
    let lines = if is_test_file(path) { 0 } else { without_tests(&code).lines().count() };
    if lines > FILE_LINES_MAX {
        complaints.push(format!("{path}: {lines} lines without tests, more than {FILE_LINES_MAX}: split it"));
    }
    let tokens = tokens(&code);
    for two in tokens.windows(2).filter(|two| two[1] == "!") {
        if two[0] == "todo" || two[0] == "unimplemented" {
            complaints.push(format!("{path}: `{}!` is not an implementation", two[0]));
        }
    }
    complaints
}

/// `unsafe` outside its places.
pub(super) fn check_unsafe(path: &str, text: &str) -> Vec<Complaint> {
    if UNSAFE_PLACES.iter().any(|place| path.starts_with(place)) {
        return Vec::new();
    }
    let code = code(text);
    let mut lines = code.lines().enumerate();
    let found = lines.find(|(_, line)| tokens(line).iter().any(|token| token == "unsafe"));
    let complaint =
        |at| format!("{path}:{}: unsafe code lives in {} only", at + 1, UNSAFE_PLACES.join(" and "));
    found.map(|(at, _)| complaint(at)).into_iter().collect()
}

/// Names of files, functions, types and modules.
pub(super) fn check_names(path: &str, text: &str) -> Vec<Complaint> {
    let stem = path.rsplit('/').next().unwrap_or(path).trim_end_matches(".rs");
    let code = code(text);
    let tokens = tokens(&code);
    let declared =
        tokens.windows(2).filter(|two| DECLARES.contains(&two[0].as_str())).map(|two| two[1].as_str());
    let names = declared.chain([stem]).filter(|name| !FOREIGN.contains(name));
    names.filter_map(|name| Some(format!("{path}: '{name}': {}", empty_name(name)?))).collect()
}

fn empty_name(name: &str) -> Option<&'static str> {
    let words = words(name);
    if words.len() > 1 && words[0] == "get" {
        return Some("a getter is named after what it gives");
    }
    let last = words.last()?;
    EMPTY_WORDS.contains(&last.as_str()).then_some("say what it is or does; the last word says nothing")
}

/// Lower-case words of a snake or camel case name.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    for letter in name.chars() {
        if letter == '_' || letter.is_uppercase() {
            words.push(String::new());
        }
        if letter != '_' {
            words.last_mut().expect("never empty").extend(letter.to_lowercase());
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// Clock, chance or IO in the protocol.
pub(super) fn check_purity(path: &str, text: &str) -> Vec<Complaint> {
    let code = without_tests(&code(text));
    let joined = format!(" {} ", tokens(&code).join(" ").replace(" :: ", "::"));
    let is_inside = |word: &str| {
        joined.match_indices(word).any(|(at, _)| {
            let before = joined[..at].chars().next_back().unwrap_or(' ');
            let after = joined[at + word.len()..].chars().next().unwrap_or(' ');
            let starts = !before.is_alphanumeric() && before != '_';
            starts && (word.contains("net::") || !(after.is_alphanumeric() || after == '_'))
        })
    };
    let found = IMPURE.iter().filter(|word| is_inside(word));
    found
        .map(|word| format!("{path}: `{word}`: time and the network are arguments of the protocol"))
        .collect()
}

/// The source with comments, strings and character literals blanked out; lines stay where they are.
pub(super) fn code(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = literal_end(&chars, at);
        if end > at {
            out.extend(chars[at..end].iter().map(|letter| if *letter == '\n' { '\n' } else { ' ' }));
            at = end;
        } else {
            out.push(chars[at]);
            at += 1;
        }
    }
    out
}

/// Where the comment or literal that begins at `at` ends; `at` itself if none begins there.
fn literal_end(chars: &[char], at: usize) -> usize {
    let next = |offset: usize| chars.get(at + offset).copied().unwrap_or('\0');
    match (chars[at], next(1)) {
        ('/', '/') => (at..chars.len()).find(|end| chars[*end] == '\n').unwrap_or(chars.len()),
        ('/', '*') => block_comment_end(chars, at),
        ('"', _) => string_end(chars, at + 1),
        ('r', '"' | '#') if !is_inside_name(chars, at) => raw_string_end(chars, at + 1).unwrap_or(at),
        ('b' | 'c', 'r') if !is_inside_name(chars, at) => raw_string_end(chars, at + 2).unwrap_or(at),
        // A character, not a lifetime: '\n' or 'x'.
        ('\'', '\\') => (at + 3..chars.len()).find(|end| chars[*end] == '\'').map_or(at, |end| end + 1),
        ('\'', _) if next(2) == '\'' => at + 3,
        _ => at,
    }
}

fn is_inside_name(chars: &[char], at: usize) -> bool {
    at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_')
}

fn block_comment_end(chars: &[char], start: usize) -> usize {
    let (mut depth, mut at) = (0, start);
    while at + 1 < chars.len() {
        match (chars[at], chars[at + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return at;
        }
    }
    chars.len()
}

fn string_end(chars: &[char], mut at: usize) -> usize {
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(chars.len())
}

/// `at` is behind the `r`. None where no raw string follows (`r#name`).
fn raw_string_end(chars: &[char], at: usize) -> Option<usize> {
    let hashes = chars[at..].iter().take_while(|letter| **letter == '#').count();
    if chars.get(at + hashes) != Some(&'"') {
        return None;
    }
    let body = at + hashes + 1;
    let closes = |end: &usize| {
        chars[*end] == '"' && chars[end + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes
    };
    Some((body..chars.len()).find(closes).map_or(chars.len(), |end| end + 1 + hashes))
}

/// Blanked source without the items marked `#[cfg(test)]`.
pub(super) fn without_tests(code: &str) -> String {
    let mut kept = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(start) = rest.find("#[cfg(") {
        let Some(close) = rest[start..].find(")]").map(|close| start + close + 2) else { break };
        let condition = tokens(&rest[start..close]);
        let negated = condition.iter().any(|token| token == "not");
        if negated || !condition.iter().any(|token| token == "test") {
            kept.push_str(&rest[..close]);
            rest = &rest[close..];
            continue;
        }
        kept.push_str(&rest[..start]);
        rest = &rest[item_end(rest, close)..];
    }
    kept.push_str(rest);
    kept
}

/// Where the item that begins at `from` ends: behind its `;` or its closing brace.
fn item_end(code: &str, from: usize) -> usize {
    let mut depth = 0;
    for (at, letter) in code[from..].char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ';' => {}
            _ => continue,
        }
        if depth == 0 {
            return from + at + 1;
        }
    }
    code.len()
}

/// Names, `::` and single punctuation marks of blanked source.
pub(super) fn tokens(code: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    let mut name_goes_on = false;
    let mut colon = false;
    for letter in code.chars() {
        let in_name = letter.is_alphanumeric() || letter == '_';
        match tokens.last_mut() {
            Some(last) if in_name && name_goes_on => last.push(letter),
            Some(last) if letter == ':' && colon => last.push(letter),
            _ if letter.is_whitespace() => {}
            _ => tokens.push(letter.to_string()),
        }
        colon = letter == ':' && tokens.last().is_some_and(|last| last == ":");
        name_goes_on = in_name;
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_header_or_too_long_or_unfinished_is_seen() {
        assert_eq!(check_file("a/src/x.rs", "fn f() {}\n").len(), 1);
        assert_eq!(check_file("a/src/mod.rs", "//! X.\n").len(), 1);
        let long = format!("//! X.\n{}", "fn f() {}\n".repeat(FILE_LINES_MAX));
        assert_eq!(check_file("a/src/x.rs", &long).len(), 1);
        let tested =
            format!("//! X.\n#[cfg(test)]\nmod tests {{\n{}}}\n", "fn f() {}\n".repeat(FILE_LINES_MAX));
        assert!(check_file("a/src/x.rs", &tested).is_empty());
        assert_eq!(check_file("a/src/x.rs", "//! X.\nfn f() { todo!() }").len(), 1);
        assert_eq!(check_file("a/src/x.rs", "//! X.\nfn f() { unimplemented!(\"x\") }").len(), 1);
        assert!(check_file("a/src/x.rs", "//! X.\nfn f() -> bool { a != b }").is_empty());
    }

    #[test]
    fn unsafe_outside_its_places_is_seen() {
        let text = "//! X.\nfn f() { unsafe { g() } }";
        assert_eq!(check_unsafe("model/src/pack.rs", text).len(), 1);
        assert!(check_unsafe("model/src/kernel/avx2.rs", text).is_empty());
        assert!(check_unsafe("model/src/region.rs", text).is_empty());
        assert!(
            check_unsafe(
                "router/src/http.rs",
                "#![deny(unsafe_code)] // unsafe\nconst X: &str = \"unsafe\";"
            )
            .is_empty()
        );
    }

    #[test]
    fn names_that_say_nothing_are_seen() {
        assert_eq!(check_names("a/src/x.rs", "struct PageManager; fn get_page() {} mod util {}").len(), 3);
        assert_eq!(check_names("a/src/helpers.rs", "").len(), 1);
        assert!(
            check_names("a/src/x.rs", "fn common_prefix() {} fn info_hash() {} fn target() {} fn get() {}")
                .is_empty()
        );
        assert!(check_names("a/src/x.rs", "fn log() { info!(\"fn manager\"); }").is_empty());
    }

    #[test]
    fn clock_and_io_in_the_protocol_are_seen() {
        for text in
            ["use std::time::Instant;", "fn f() { std::fs::read(x); }", "async fn f() { tokio::spawn(x) }"]
        {
            assert_eq!(check_purity("mesh/proto/src/x.rs", text).len(), 1, "{text}");
        }
        assert_eq!(
            check_purity("mesh/proto/src/x.rs", "fn f() { std::net::TcpStream::connect(x); }").len(),
            1
        );
        let pure = "use std::net::SocketAddr;\n// Instant\n#[cfg(test)]\nmod tests { use std::fs; }\nstruct Instantly;";
        assert!(check_purity("mesh/proto/src/x.rs", pure).is_empty());
    }

    #[test]
    fn comments_and_literals_are_blanked() {
        let text = "a /* b /* c */ d */ e // f\n\"g \\\" h\" i r#\"j \" k\"# l 'm' n '\\'' o &'p q r\"s\" br\"t\" r#type";
        let left = tokens(&code(text));
        assert_eq!(left, ["a", "e", "i", "l", "n", "o", "&", "'", "p", "q", "r", "#", "type"]);
        assert_eq!(code(text).lines().count(), 2);
        assert_eq!(tokens("a::b:c"), ["a", "::", "b", ":", "c"]);
    }

    #[test]
    fn tests_are_cut_out_and_nothing_else() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests;\n#[cfg(test)]\nfn b() { { } }\n#[cfg(not(test))]\nfn c() {}\n#[cfg(unix)]\nfn d() {}";
        let left = tokens(&without_tests(text)).join(" ");
        assert!(left.contains("fn a") && left.contains("fn c") && left.contains("fn d"), "{left}");
        assert!(!left.contains("mod tests") && !left.contains("fn b"), "{left}");
    }
}
