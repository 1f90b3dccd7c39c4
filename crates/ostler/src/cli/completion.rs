//! `ostler completion`: scripts that shells complete our commands with.

use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::Shell;

use super::error::Result;
use super::output::write_bytes;

const EXAMPLES: &str = "\
Examples:
  source <(ostler completion bash)
  ostler completion zsh > ~/.zfunc/_ostler
  ostler completion fish > ~/.config/fish/completions/ostler.fish";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CompletionArgs {
    shell: Kind,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Kind {
    Bash,
    Zsh,
    Fish,
}

pub(crate) fn run(args: &CompletionArgs) -> Result<()> {
    write_bytes(&script(args.shell))
}

fn script(kind: Kind) -> Vec<u8> {
    let shell = match kind {
        Kind::Bash => Shell::Bash,
        Kind::Zsh => Shell::Zsh,
        Kind::Fish => Shell::Fish,
    };
    let mut bytes = Vec::new();
    clap_complete::generate(shell, &mut super::Cli::command(), "ostler", &mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_script_knows_the_commands() {
        for kind in [Kind::Bash, Kind::Zsh, Kind::Fish] {
            let text = String::from_utf8(script(kind)).unwrap();
            for word in ["ostler", "console", "image", "import", "accelerator", "microvm"] {
                assert!(text.contains(word), "{kind:?} {word}");
            }
        }
    }
}
