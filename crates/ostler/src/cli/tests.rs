//! The whole command line as one text, and what its parser takes and refuses.

use clap::{CommandFactory, Parser};

use super::{Cli, Command};

/// Every `--help` there is, one after the other.
fn help_tree() -> String {
    let mut text = String::new();
    collect(&Cli::command(), &mut vec!["ostler".to_owned()], &mut text);
    text
}

fn collect(command: &clap::Command, path: &mut Vec<String>, text: &mut String) {
    let asked = path.iter().cloned().chain(["--help".to_owned()]);
    let answer = Cli::command().term_width(100).try_get_matches_from(asked);
    let mut help = answer.expect_err("help is not a command to run").to_string();
    // They are the same for every command: once is enough.
    if !text.is_empty()
        && let Some(begin) = help.find("Global options:\n")
    {
        let end = help[begin..].find("\n\n").map_or(help.len(), |length| begin + length + 2);
        help.replace_range(begin..end, "");
    }
    text.push_str(&format!("======== {} ========\n{}\n\n", path.join(" "), help.trim_end()));
    for inner in command.get_subcommands() {
        path.push(inner.get_name().to_owned());
        collect(inner, path, text);
        path.pop();
    }
}

#[test]
fn the_help_tree_is_as_it_was() {
    insta::assert_snapshot!("help", help_tree());
}

#[test]
fn the_tree_is_well_formed() {
    Cli::command().debug_assert();
}

fn parses(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

#[test]
fn names_that_scripts_rely_on_parse() {
    for line in [
        "ostler serve --data-dir /d --listen 127.0.0.1:8550",
        "ostler image import debian ./x.qcow2",
        "ostler image import debian - --sha256 0000000000000000000000000000000000000000000000000000000000000000",
        "ostler vm create web --image i --cpus 2 --memory 1G --disk 20G --wait",
        "ostler vm create web --kernel k --initrd i --cmdline console=ttyS0 --wait --timeout 90",
        "ostler vm create web --image i -p 2222:22 --publish 0.0.0.0:53:53/udp --label a=b --node-selector x=y",
        "ostler vm show web -o json",
        "ostler vm list -o wide --phase running,error --label tier=web --node n1 --name web",
        "ostler vm delete a b c --wait --force",
        "ostler vm shutdown web --grace 30s --no-force --wait --timeout 5m",
        "ostler vm rebuild web --image other --disk 4G",
        "ostler vm log web --follow --tail 4K",
        "ostler vm console web --no-stdin",
        "ostler node list",
        "ostler operation cancel x",
        "ostler token create ci --role reader --ttl 90d",
        "ostler token revoke ci",
        "ostler events --follow",
        "ostler version",
        "ostler completion bash",
        "ostler context set home --host https://x",
        "ostler --host unix:///s vm list",
    ] {
        if let Err(error) = parses(line) {
            panic!("{line}: {error}");
        }
    }
}

#[test]
fn what_cannot_be_is_a_usage_error_that_says_why() {
    for (line, word) in [
        ("ostler vm create Web", "'W'"),
        ("ostler vm create web --memory lots", "512M"),
        ("ostler vm create web --cpus many", "--cpus"),
        ("ostler vm create web --initrd i", "--kernel"),
        ("ostler vm create web --publish 99999:22", "HOST_PORT"),
        ("ostler vm create web --machine pdp11", "microvm"),
        ("ostler vm delete", "<VM>"),
        ("ostler vm start web --timeout soon", "90s"),
        ("ostler image import i f --sha256 12", "64"),
        ("ostler vm list -A --project x", "cannot be used with"),
        ("ostler frobnicate", "frobnicate"),
    ] {
        let error = parses(line).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}");
        assert!(error.to_string().contains(word), "{line}: {error}");
    }
}

#[test]
fn a_secret_in_the_environment_is_not_in_the_help() {
    let command = Cli::command();
    let named: Vec<_> = command.get_arguments().filter(|arg| arg.get_env().is_some()).collect();
    assert!(named.iter().any(|arg| arg.get_id() == "token"));
    assert!(named.iter().all(|arg| arg.is_hide_env_values_set()));
}

#[test]
fn the_command_enum_stays_small() {
    // The tree is parsed once; a giant variant would be copied for every command.
    assert!(size_of::<Command>() <= 512, "{}", size_of::<Command>());
}
