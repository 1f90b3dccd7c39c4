//! Results on standard output, in the format that was asked for; notes on standard error.

use std::io::{self, Write};

use clap::ValueEnum;
use ostler_api::{Fault, Resource, Time};
use serde::Serialize;

use super::error::{CliError, Exit, Result};
use super::table::{Column, Fields, Table};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Wide,
    Json,
    Yaml,
    Name,
}

/// How a resource looks to people.
pub(crate) trait Show: Resource {
    const COLUMNS: &'static [Column];

    /// One cell for each column; empty where there is nothing.
    fn cells(&self, now: Time) -> Vec<String>;

    fn fields(&self, now: Time) -> Fields;

    /// Why it is in error, if it is.
    fn fault(&self) -> Option<&Fault> {
        None
    }

    /// Whether it stays as it is until somebody asks for something.
    fn settled(&self) -> bool {
        true
    }

    fn in_error(&self) -> bool {
        self.phase() == "error"
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    pub(crate) format: Format,
}

impl Output {
    /// Whether a person reads it, who wants sentences.
    pub(crate) const fn is_human(self) -> bool {
        match self.format {
            Format::Table | Format::Wide => true,
            Format::Json | Format::Yaml | Format::Name => false,
        }
    }

    pub(crate) const fn is_wide(self) -> bool {
        matches!(self.format, Format::Wide)
    }

    pub(crate) fn list<T: Show>(self, items: &[T]) -> Result<()> {
        let now = Time::now();
        match self.format {
            Format::Table | Format::Wide => {
                let rows: Vec<_> = items.iter().map(|item| item.cells(now)).collect();
                write(&Table::new(T::COLUMNS, self.is_wide()).whole(&rows))
            }
            Format::Json | Format::Yaml => self.value(&items),
            Format::Name => {
                write(&items.iter().map(|item| format!("{}\n", item.metadata().name)).collect::<String>())
            }
        }
    }

    pub(crate) fn one<T: Show>(self, item: &T) -> Result<()> {
        match self.format {
            Format::Table | Format::Wide => write(&item.fields(Time::now()).text()),
            Format::Json | Format::Yaml | Format::Name => self.changed(std::slice::from_ref(item), true),
        }
    }

    /// What a command changed, for programs: one as itself, several as a list. People get sentences instead.
    pub(crate) fn changed<T: Show>(self, items: &[T], single: bool) -> Result<()> {
        match (self.format, items) {
            (Format::Table | Format::Wide, _) => Ok(()),
            (Format::Name, items) => self.list(items),
            (Format::Json | Format::Yaml, [item]) if single => self.value(item),
            (Format::Json | Format::Yaml, items) => self.value(&items),
        }
    }

    /// Any value as JSON or YAML; as JSON where neither was asked for.
    pub(crate) fn value(self, value: &impl Serialize) -> Result<()> {
        let broken = |e: &dyn std::fmt::Display| CliError::failed(format!("cannot write the result: {e}"));
        match self.format {
            Format::Yaml => write(&serde_saphyr::to_string(value).map_err(|e| broken(&e))?),
            Format::Table | Format::Wide | Format::Json | Format::Name => {
                write(&(serde_json::to_string_pretty(value).map_err(|e| broken(&e))? + "\n"))
            }
        }
    }

    /// A sentence for people; programs do not get it.
    pub(crate) fn say(self, line: &str) -> Result<()> {
        if self.is_human() { write(&format!("{}\n", super::text::clean(line))) } else { Ok(()) }
    }
}

/// A value on one line of JSON.
pub(crate) fn json_line(value: &impl Serialize) -> Result<()> {
    let line = serde_json::to_string(value)
        .map_err(|e| CliError::failed(format!("cannot write the result: {e}")))?;
    write(&(line + "\n"))
}

pub(crate) fn write(text: &str) -> Result<()> {
    write_bytes(text.as_bytes())
}

pub(crate) fn write_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(output_error)
}

/// A reader that has enough is no failure of ours.
pub(crate) fn output_error(error: io::Error) -> CliError {
    if error.kind() == io::ErrorKind::BrokenPipe {
        CliError::quiet(Exit::Done)
    } else {
        CliError::failed("cannot write the output").why(error.to_string())
    }
}

/// A line on standard error. When even that is closed there is nobody to tell.
pub(crate) fn note(line: &str) {
    note_raw(&format!("{}\n", super::text::clean(line)));
}

pub(crate) fn note_raw(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}
