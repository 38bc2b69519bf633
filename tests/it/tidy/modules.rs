//! The order of modules: each imports only modules that `lib.rs` (or `main.rs`) lists after it, so every crate can be
//! read from the top and has no cycles. Inside a module its children may come in any order, but not in a circle.
//!
//! A module and what lies below it count as one: a child may use its parent's types.

use super::source::{code, is_test_file, tokens, without_tests};
use super::{Complaint, SourceFile};
use std::collections::{BTreeMap, BTreeSet};

/// Modules of one crate: path of each, and the order of its children.
type Children = BTreeMap<Vec<String>, Vec<String>>;
/// Who imports whom among the children of one module.
type Siblings = BTreeMap<String, BTreeSet<String>>;
/// The same for every module.
type Imports = BTreeMap<Vec<String>, Siblings>;

/// Complaints about all crates whose sources are among `files`.
pub(super) fn check(files: &[SourceFile]) -> Vec<Complaint> {
    let roots =
        files.iter().filter(|file| file.path.ends_with("src/lib.rs") || file.path.ends_with("src/main.rs"));
    roots.flat_map(|root| check_crate(root, files)).collect()
}

fn check_crate(root: &SourceFile, files: &[SourceFile]) -> Vec<Complaint> {
    let folder = &root.path[..root.path.rfind('/').map_or(0, |at| at + 1)];
    let members: Vec<(Vec<String>, &SourceFile, Vec<String>)> = files
        .iter()
        .filter(|file| {
            file.path.starts_with(folder) && file.path.ends_with(".rs") && !is_test_file(&file.path)
        })
        .map(|file| {
            (module_path(&file.path[folder.len()..]), file, tokens(&without_tests(&code(&file.text))))
        })
        .collect();
    let children: Children =
        members.iter().map(|(module, _, tokens)| (module.clone(), declared(tokens))).collect();
    let reexported =
        members.iter().find(|(module, _, _)| module.is_empty()).map(|(_, _, tokens)| reexports(tokens));
    let reexported = reexported.unwrap_or_default();
    let mut complaints = Vec::new();
    let mut imports = Imports::new();
    for (module, file, tokens) in members.iter().filter(|(module, _, _)| !module.is_empty()) {
        for path in references(module, tokens) {
            match import(&children, module, &path) {
                Some((parent, here, there)) if parent.is_empty() => {
                    let text =
                        wrong_order(&children, &here, &there).map(|text| format!("{}: {text}", file.path));
                    complaints.extend(text);
                }
                Some((parent, here, there)) => {
                    imports.entry(parent).or_default().entry(here).or_default().insert(there);
                }
                None => {
                    let name = path
                        .first()
                        .filter(|name| reexported.contains(name) && !children.contains_key(&path[..1]));
                    let why = "from the root of the crate: name the module that defines it";
                    complaints.extend(name.map(|name| format!("{}: imports '{name}' {why}", file.path)));
                }
            }
        }
    }
    for (parent, imports) in &imports {
        complaints.extend(circle(imports).map(|names| {
            let circle = names.join(" -> ");
            format!("{folder}{}: modules import each other in a circle: {circle}", parent.join("/"))
        }));
    }
    complaints.sort();
    complaints.dedup();
    complaints
}

/// `a/b.rs` is module a::b; the root is the empty path.
fn module_path(file: &str) -> Vec<String> {
    match file.trim_end_matches(".rs") {
        "lib" | "main" => Vec::new(),
        path => path.split('/').map(str::to_string).collect(),
    }
}

/// Names in `mod name;` lines, in order.
fn declared(tokens: &[String]) -> Vec<String> {
    tokens
        .windows(3)
        .filter(|three| three[0] == "mod" && three[2] == ";")
        .map(|three| three[1].clone())
        .collect()
}

/// Names that the root offers as its own: importing those would hide which module is meant.
fn reexports(tokens: &[String]) -> Vec<String> {
    let mut names = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        if token == "use" && at > 0 && (tokens[at - 1] == "pub" || tokens[at - 1] == ")") {
            let statement = tokens[at..].iter().take_while(|token| *token != ";");
            names.extend(statement.filter(|token| is_name(token)).cloned());
        }
    }
    names
}

fn is_name(token: &str) -> bool {
    token.chars().next().is_some_and(|first| first.is_alphabetic() || first == '_')
}

/// Every path in the file that starts with `crate`, `self` or `super`, made absolute.
fn references(module: &[String], tokens: &[String]) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at + 1 < tokens.len() {
        let start = tokens[at].as_str();
        let inside = at > 0 && tokens[at - 1] == "::";
        if inside || !matches!(start, "crate" | "self" | "super") || tokens[at + 1] != "::" {
            at += 1;
            continue;
        }
        let mut base = match start {
            "crate" => Vec::new(),
            "self" => module.to_vec(),
            _ => module[..module.len() - 1].to_vec(),
        };
        at += 2;
        while tokens.get(at).is_some_and(|token| token == "super") {
            base.pop();
            at += 2;
        }
        at = tree(tokens, at, &base, &mut found);
    }
    found
}

/// Reads one use tree from `at` on; returns where it ends.
fn tree(tokens: &[String], mut at: usize, base: &[String], found: &mut Vec<Vec<String>>) -> usize {
    let mut path = base.to_vec();
    while let Some(token) = tokens.get(at) {
        if token == "{" {
            at += 1;
            while tokens.get(at).is_some_and(|token| token != "}") {
                let next = tree(tokens, at, &path, found);
                at = if next == at || tokens.get(next).is_some_and(|token| token == ",") {
                    next + 1
                } else {
                    next
                };
            }
            return at + 1;
        }
        if !is_name(token) {
            break;
        }
        if token != "self" {
            path.push(token.clone());
        }
        at += 1;
        if tokens.get(at).is_none_or(|token| token != "::") {
            break;
        }
        at += 1;
    }
    if tokens.get(at).is_some_and(|token| token == "as") {
        at += 2;
    }
    found.push(path);
    at
}

/// What an import means among siblings: their parent, the one that imports and the imported one. None where it stays
/// inside one module, or leads to no module.
fn import(children: &Children, from: &[String], path: &[String]) -> Option<(Vec<String>, String, String)> {
    let known = (0..=path.len()).rev().find(|len| children.contains_key(&path[..*len]))?;
    let to = &path[..known];
    let shared = from.iter().zip(to).take_while(|(a, b)| a == b).count();
    Some((from[..shared].to_vec(), from.get(shared)?.clone(), to.get(shared)?.clone()))
}

fn wrong_order(children: &Children, here: &str, there: &str) -> Option<Complaint> {
    let order = children.get(&Vec::new())?;
    let place = |name: &str| order.iter().position(|other| other == name);
    (place(there)? <= place(here)?).then(|| {
        format!(
            "'{here}' imports '{there}', which the crate lists before it: move the code or the `mod` line"
        )
    })
}

/// A circle of imports, if there is one: follows every import as far as it goes.
fn circle(imports: &Siblings) -> Option<Vec<&str>> {
    fn follow<'a>(imports: &'a Siblings, way: &mut Vec<&'a str>, done: &mut BTreeSet<&'a str>) -> bool {
        let here = way[way.len() - 1];
        if way[..way.len() - 1].contains(&here) {
            return true;
        }
        for next in imports
            .get(here)
            .into_iter()
            .flatten()
            .filter(|next| !done.contains(next.as_str()))
            .collect::<Vec<_>>()
        {
            way.push(next);
            if follow(imports, way, done) {
                return true;
            }
            way.pop();
        }
        done.insert(here);
        false
    }
    let mut done = BTreeSet::new();
    for start in imports.keys() {
        let mut way = vec![start.as_str()];
        if !done.contains(start.as_str()) && follow(imports, &mut way, &mut done) {
            let end = way[way.len() - 1];
            let begin = way.iter().position(|name| *name == end).unwrap_or_default();
            return Some(way.split_off(begin));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(texts: &[(&str, &str)]) -> Vec<SourceFile> {
        texts
            .iter()
            .map(|(path, text)| SourceFile { path: path.to_string(), text: text.to_string() })
            .collect()
    }

    fn complaints(upper: &str, lower: &str) -> usize {
        let root = "pub mod upper;\npub mod lower;\npub use lower::Thing;\n";
        check(&files(&[("x/src/lib.rs", root), ("x/src/upper.rs", upper), ("x/src/lower.rs", lower)])).len()
    }

    #[test]
    fn an_import_upwards_is_seen_however_it_is_written() {
        assert_eq!(complaints("use crate::lower::Thing;", "pub struct Thing;"), 0);
        assert_eq!(complaints("", "use crate::upper::Other;"), 1);
        assert_eq!(complaints("", "use crate::{upper::{self, Other as Some}, lower};"), 1);
        assert_eq!(complaints("", "use super::upper;"), 1);
        assert_eq!(complaints("", "fn f() -> u32 { crate::upper::f() + 1 }"), 1);
        assert_eq!(complaints("", "use std::{io, fmt};\nuse crate::{\n    upper::a,\n};"), 1);
        assert_eq!(complaints("use crate::Thing;", ""), 1);
    }

    #[test]
    fn comments_strings_and_tests_import_nothing() {
        assert_eq!(complaints("", "// use crate::upper::Other;\nconst T: &str = \"crate::upper::x\";"), 0);
        assert_eq!(complaints("", "#[cfg(test)]\nmod tests { use crate::upper::Other; }"), 0);
    }

    #[test]
    fn a_circle_inside_a_module_is_seen_and_children_may_look_up() {
        let inside = |first: &str, second: &str| {
            let root = ("x/src/lib.rs", "mod a;");
            let parent = ("x/src/a.rs", "mod first; mod second; mod third; pub struct T;");
            let third = ("x/src/a/third.rs", "mod deep;");
            let deep = ("x/src/a/third/deep.rs", "use super::super::first::X;");
            check(&files(&[
                root,
                parent,
                ("x/src/a/first.rs", first),
                ("x/src/a/second.rs", second),
                third,
                deep,
            ]))
        };
        assert!(inside("use super::{T, second::Y};", "").is_empty());
        assert!(inside("", "use crate::a::first::X;").is_empty());
        assert_eq!(inside("use super::second::Y;", "use super::first::X;").len(), 1);
        let through_three = inside("use super::second;", "use super::third::deep::Y;");
        assert_eq!(
            through_three,
            ["x/src/a: modules import each other in a circle: first -> second -> third -> first"]
        );
    }
}
