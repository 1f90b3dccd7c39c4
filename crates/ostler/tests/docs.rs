//! The documentation against the repository and the binary: every path it names exists, every command it shows is one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository")
}

/// One page: its path below the repository, and its text.
struct Page {
    path: PathBuf,
    text: String,
}

fn pages() -> Vec<Page> {
    let root = root();
    let docs = std::fs::read_dir(root.join("docs")).expect("docs/");
    let mut paths: Vec<PathBuf> =
        docs.map(|entry| Path::new("docs").join(entry.expect("an entry").file_name())).collect();
    paths.extend(["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"].map(PathBuf::from));
    paths.retain(|path| path.extension().is_some_and(|kind| kind == "md"));
    let read = |path: PathBuf| {
        let text =
            std::fs::read_to_string(root.join(&path)).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        Page { path, text }
    };
    paths.into_iter().map(read).collect()
}

/// The lines outside of fenced blocks, and the blocks with their language.
fn split(text: &str) -> (Vec<&str>, Vec<(&str, Vec<&str>)>) {
    let (mut prose, mut blocks) = (Vec::new(), Vec::<(&str, Vec<&str>)>::new());
    let mut inside = false;
    for line in text.lines() {
        match (line.strip_prefix("```"), inside) {
            (Some(language), false) => blocks.push((language, Vec::new())),
            (None, true) => blocks.last_mut().expect("a block").1.push(line),
            (None, false) => prose.push(line),
            (Some(_), true) => {}
        }
        inside ^= line.starts_with("```");
    }
    assert!(!inside, "a block is not closed");
    (prose, blocks)
}

/// What stands between single backticks.
fn code(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// What stands in `](…)`.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| rest.split(')').next())
}

/// Whether a word in backticks means a file of this repository.
fn is_repository_path(word: &str) -> bool {
    const TOP: [&str; 9] =
        ["crates/", "docs/", "scripts/", "guest/", "fuzz/", "benches/", "dist/", ".ci/", ".config/"];
    let plain = word.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c));
    plain && (TOP.iter().any(|top| word.starts_with(top)) || ["deny.toml", "Cargo.toml"].contains(&word))
}

#[test]
fn every_path_exists() {
    let root = root();
    let mut missing = Vec::new();
    for page in pages() {
        let (prose, _) = split(&page.text);
        for line in prose {
            // A command in backticks is a path and its arguments.
            let words = code(line).filter_map(|text| text.split_whitespace().next());
            for word in words.filter(|word| is_repository_path(word)) {
                if !root.join(word).exists() {
                    missing.push(format!("{}: {word}", page.path.display()));
                }
            }
            for link in links(line).filter(|link| !link.contains("://")) {
                let file = link.split('#').next().unwrap_or_default();
                let beside = page.path.parent().unwrap_or(Path::new(""));
                if !root.join(beside).join(file).exists() {
                    missing.push(format!("{}: {link}", page.path.display()));
                }
            }
        }
    }
    assert!(missing.is_empty(), "these are not there:\n{}", missing.join("\n"));
}

/// Splits a shell line into words; quotes hold words together.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
    for c in line.chars() {
        match (quote, c) {
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), c) if open == c => quote = None,
            (None, c) if c.is_whitespace() => {
                words.extend(Some(std::mem::take(&mut word)).filter(|w| !w.is_empty()))
            }
            (_, c) => word.push(c),
        }
    }
    words.extend(Some(word).filter(|w| !w.is_empty()));
    words
}

/// The simple commands of a shell block, each as words: without assignments and `xargs` before them and
/// redirections behind.
fn commands(lines: &[&str]) -> Vec<Vec<String>> {
    let joined = lines.join("\n").replace("\\\n", " ");
    let mut commands = Vec::new();
    for line in joined.lines() {
        for part in line.replace("&&", "|").split('|') {
            let words = words(part);
            let assigned = |word: &String| {
                word.split_once('=').is_some_and(|(name, _)| {
                    !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c == '_')
                })
            };
            let mut command: Vec<String> =
                words.into_iter().skip_while(assigned).take_while(|word| !word.starts_with('>')).collect();
            if command.first().is_some_and(|word| word == "xargs") {
                command = command.into_iter().skip(1).skip_while(|word| word.starts_with('-')).collect();
            }
            commands.push(command);
        }
    }
    commands.retain(|command: &Vec<String>| !command.is_empty());
    commands
}

/// The commands in the shell blocks and in the backticks of all pages, with the page.
fn shown(program: impl Fn(&str) -> bool) -> Vec<(PathBuf, Vec<String>)> {
    let mut all = Vec::new();
    for page in pages() {
        let (prose, blocks) = split(&page.text);
        let shell = blocks.iter().filter(|(language, _)| *language == "sh");
        let mut found: Vec<Vec<String>> = shell.flat_map(|(_, lines)| commands(lines)).collect();
        found.extend(prose.iter().flat_map(|line| code(line)).flat_map(|text| commands(&[text])));
        found.retain(|command| program(&command[0]));
        all.extend(found.into_iter().map(|command| (page.path.clone(), command)));
    }
    all
}

fn help(path: &[String]) -> Option<String> {
    let output = Command::new(env!("CARGO_BIN_EXE_ostler"))
        .args(path)
        .arg("--help")
        .env_clear()
        .output()
        .expect("the binary runs");
    output.status.success().then(|| String::from_utf8(output.stdout).expect("help is text"))
}

/// Whether a help text offers this flag.
fn offers(help: &str, flag: &str) -> bool {
    help.lines()
        .map(str::trim_start)
        .filter(|line| line.starts_with('-'))
        .any(|line| line.split(|c: char| c.is_whitespace() || c == ',').take(3).any(|word| word == flag))
}

#[test]
fn every_ostler_command_is_one() {
    let mut helps: BTreeMap<Vec<String>, Option<String>> = BTreeMap::new();
    let mut wrong = Vec::new();
    let commands = shown(|program| program == "ostler");
    assert!(commands.len() > 40, "the commands were found: {}", commands.len());
    for (page, command) in commands {
        let mut complain =
            |why: String| wrong.push(format!("{}: {}: {why}", page.display(), command.join(" ")));
        // As deep into the tree of commands as its first words lead.
        let mut path: Vec<String> = Vec::new();
        for word in command[1..].iter().take_while(|word| !word.starts_with('-')) {
            path.push(word.clone());
            if helps.entry(path.clone()).or_insert_with(|| help(&path)).is_none()
                || !has_usage(&helps[&path], &path)
            {
                path.pop();
                break;
            }
        }
        let text = helps.entry(path.clone()).or_insert_with(|| help(&path)).clone();
        let Some(text) = text else {
            complain("there is no such command".to_owned());
            continue;
        };
        let only_a_group = text.contains("<COMMAND>") && command.len() > path.len() + 1;
        if only_a_group && command.get(path.len() + 1).is_some_and(|word| !word.starts_with('-')) {
            complain(format!("ostler {} has no such command", path.join(" ")));
        }
        for flag in command.iter().filter(|word| word.starts_with('-') && word.len() > 1) {
            let flag = flag.split('=').next().unwrap_or(flag);
            if !offers(&text, flag) {
                complain(format!("ostler {} has no {flag}", path.join(" ")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A word that is an argument and no command is answered with the help of the command before it.
fn has_usage(help: &Option<String>, path: &[String]) -> bool {
    let usage = format!("Usage: ostler {}", path.join(" "));
    help.as_ref()
        .is_some_and(|help| help.lines().any(|line| line == usage || line.starts_with(&format!("{usage} "))))
}

#[test]
fn every_script_answers_for_itself() {
    let mut scripts: Vec<(PathBuf, Vec<String>)> =
        shown(|program| program.starts_with("scripts/") || program.starts_with("guest/"));
    scripts.retain(|(_, command)| root().join(&command[0]).is_file() && command[0] != "scripts/lib.sh");
    assert!(scripts.len() > 4, "the scripts were found");
    for (page, command) in scripts {
        let output = Command::new(root().join(&command[0])).arg("--help").output().expect("the script runs");
        let help = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{}: {} --help failed", page.display(), command[0]);
        // What goes on to the test runner is the runner's.
        for flag in command[1..].iter().filter(|word| word.starts_with("--")) {
            assert!(help.contains(flag.as_str()), "{}: {} has no {flag}", page.display(), command[0]);
        }
    }
}

#[test]
fn shell_lines_are_taken_apart() {
    let lines = [
        "A=b ostler vm create x \\",
        "  --cmdline \"a b\" > file && echo 'c d' | ostler vm list",
        "ostler vm list -o name | xargs --no-run-if-empty ostler vm stop",
    ];
    let found = commands(&lines);
    let texts: Vec<String> = found.iter().map(|command| command.join(" ")).collect();
    assert_eq!(
        texts,
        [
            "ostler vm create x --cmdline a b",
            "echo c d",
            "ostler vm list",
            "ostler vm list -o name",
            "ostler vm stop",
        ]
    );
    assert_eq!(found[0].last().map(String::as_str), Some("a b"));
}
