//! Rules of all text: nothing put off, nothing that holds on one machine only, links that lead somewhere.

use super::source::{code, tokens};
use super::{Complaint, SourceFile};

/// Marks of work put off. An issue is the place for that.
const PUT_OFF: [&str; 3] = ["TODO", "FIXME", "XXX"];
/// Whose registries and mirrors they are is the business of the tools' configuration.
const REGISTRIES: [&str; 9] = [
    "crates.io",
    "pypi.org",
    "pythonhosted.org",
    "npmjs.org",
    "npmjs.com",
    "proxy.golang.org",
    "deb.debian.org",
    "archive.ubuntu.com",
    "download.pytorch.org",
];
/// Beginnings of paths that exist on one machine only.
const ONE_MACHINE: [&str; 4] = ["/home/", "/root/", "/Users/", "/work/"];

/// Complaints about any text file.
pub(super) fn check(path: &str, text: &str) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let here = format!("{path}:{}", at + 1);
        let words: Vec<&str> =
            line.split(|letter: char| !letter.is_alphanumeric() && letter != '_').collect();
        for mark in PUT_OFF.iter().filter(|mark| words.contains(mark)) {
            complaints.push(format!("{here}: {mark}: do it now or open an issue"));
        }
        for host in REGISTRIES.iter().filter(|host| line.contains(**host)) {
            complaints.push(format!("{here}: {host}: registries are named in the tools' configuration only"));
        }
        for prefix in ONE_MACHINE.iter().filter(|prefix| starts_a_path(line, prefix)) {
            complaints.push(format!("{here}: {prefix}…: a path of one machine"));
        }
    }
    complaints
}

/// Whether `prefix` stands in `line` at the beginning of a path, not in the middle of one.
fn starts_a_path(line: &str, prefix: &str) -> bool {
    line.match_indices(prefix).any(|(at, _)| {
        let before = line[..at].chars().next_back().unwrap_or(' ');
        !(before.is_alphanumeric() || matches!(before, '/' | '.' | '_' | '-' | '}' | ')' | '$' | '~' | '*'))
    })
}

/// Relative links of a Markdown file that lead nowhere. `exists` takes a path from the root.
pub(super) fn check_links(path: &str, text: &str, exists: impl Fn(&str) -> bool) -> Vec<Complaint> {
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut complaints = Vec::new();
    for (at, line) in prose(text) {
        for target in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = target.split(['#', ' ']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            if !exists(&joined(folder, target)) {
                complaints.push(format!("{path}:{at}: the link to '{target}' leads nowhere"));
            }
        }
    }
    complaints
}

/// Numbered lines outside code blocks.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut inside_code = false;
    text.lines().enumerate().filter_map(move |(at, line)| {
        let fence = line.trim_start().starts_with("```");
        inside_code ^= fence;
        (!inside_code && !fence).then_some((at + 1, line))
    })
}

fn joined(folder: &str, target: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// Tests that a document names, written as `test: name`, but that no Rust file has.
pub(super) fn check_named_tests(document: &str, files: &[SourceFile]) -> Vec<Complaint> {
    let mut functions: Vec<String> = Vec::new();
    for file in files.iter().filter(|file| file.path.ends_with(".rs")) {
        let tokens = tokens(&code(&file.text));
        functions.extend(tokens.windows(2).filter(|two| two[0] == "fn").map(|two| two[1].clone()));
    }
    let named = document.split("`test: ").skip(1).filter_map(|rest| rest.split('`').next());
    let missing = named.filter(|name| !functions.iter().any(|function| function == name));
    missing.map(|name| format!("ARCHITECTURE.md: there is no test '{name}'")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_put_off_registries_and_local_paths_are_seen() {
        assert_eq!(check("a.rs", "// TODO: later").len(), 1);
        assert_eq!(check("a.md", "see https://crates.io/x").len(), 1);
        assert_eq!(check("a.sh", "cd /home/anne/x").len(), 1);
        assert_eq!(check("a.sh", "X=\"/root/x\"").len(), 1);
        assert!(check("a.md", "docs/work/x and $HOME/work/ and METODO and todo").is_empty());
    }

    #[test]
    fn a_dead_link_is_seen() {
        let exists = |path: &str| path == "docs/a.md" || path == "README.md";
        let text =
            "[a](a.md) [r](../README.md#x) [w](https://example.org) [here](#x)\n```\n[x](no.md)\n```\n";
        assert!(check_links("docs/b.md", text, exists).is_empty());
        assert_eq!(check_links("docs/b.md", "see [b](c.md) and [d](../d.md)", exists).len(), 2);
    }

    #[test]
    fn a_test_that_does_not_exist_is_seen() {
        let files = [SourceFile { path: "a.rs".into(), text: "fn here() {}".into() }];
        assert!(check_named_tests("guarded by `test: here`", &files).is_empty());
        assert_eq!(check_named_tests("guarded by `test: gone`", &files).len(), 1);
    }
}
