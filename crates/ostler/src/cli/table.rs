//! Tables and lists of fields, as text.

use super::text::clean;

/// A column; those that are `wide` show with `-o wide` only.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Column {
    pub(crate) title: &'static str,
    pub(crate) wide: bool,
}

pub(crate) const fn col(title: &'static str) -> Column {
    Column { title, wide: false }
}

pub(crate) const fn wide(title: &'static str) -> Column {
    Column { title, wide: true }
}

const GAP: &str = "  ";

/// Lays out rows. Rows may be added later: a column that was too narrow grows from there on.
#[derive(Debug)]
pub(crate) struct Table {
    shown: Vec<usize>,
    titles: Vec<&'static str>,
    widths: Vec<usize>,
}

impl Table {
    pub(crate) fn new(columns: &[Column], with_wide: bool) -> Self {
        let shown: Vec<usize> = (0..columns.len()).filter(|at| with_wide || !columns[*at].wide).collect();
        let titles: Vec<_> = shown.iter().map(|at| columns[*at].title).collect();
        let widths = titles.iter().map(|title| title.len()).collect();
        Self { shown, titles, widths }
    }

    /// The head and these rows.
    pub(crate) fn whole(&mut self, rows: &[Vec<String>]) -> String {
        let rows: Vec<_> = rows.iter().map(|row| self.cells(row)).collect();
        let head = self.titles.iter().map(|title| (*title).to_owned()).collect::<Vec<_>>();
        let mut text = self.line(&head);
        for row in &rows {
            text.push_str(&self.line(row));
        }
        text
    }

    /// One more row.
    pub(crate) fn row(&mut self, row: &[String]) -> String {
        let cells = self.cells(row);
        self.line(&cells)
    }

    fn cells(&mut self, row: &[String]) -> Vec<String> {
        let cells: Vec<String> = self
            .shown
            .iter()
            .map(|at| match row.get(*at).map(String::as_str) {
                None | Some("") => "-".to_owned(),
                Some(cell) => clean(cell).into_owned(),
            })
            .collect();
        for (width, cell) in self.widths.iter_mut().zip(&cells) {
            *width = (*width).max(cell.chars().count());
        }
        cells
    }

    fn line(&self, cells: &[String]) -> String {
        let mut line = String::new();
        for (at, cell) in cells.iter().enumerate() {
            line.push_str(cell);
            if at + 1 < cells.len() {
                let fill = self.widths[at].saturating_sub(cell.chars().count());
                line.extend(std::iter::repeat_n(' ', fill));
                line.push_str(GAP);
            }
        }
        line.push('\n');
        line
    }
}

/// Fields of one thing, in sections.
#[derive(Debug, Default)]
pub(crate) struct Fields {
    lines: Vec<Line>,
}

#[derive(Debug)]
enum Line {
    Section(&'static str),
    Field(String, String),
}

impl Fields {
    pub(crate) fn section(&mut self, title: &'static str) -> &mut Self {
        self.lines.push(Line::Section(title));
        self
    }

    pub(crate) fn field(&mut self, name: impl Into<String>, value: impl Into<String>) -> &mut Self {
        self.lines.push(Line::Field(name.into(), value.into()));
        self
    }

    pub(crate) fn maybe(&mut self, name: impl Into<String>, value: Option<impl ToString>) -> &mut Self {
        if let Some(value) = value {
            self.field(name, value.to_string());
        }
        self
    }

    pub(crate) fn text(&self) -> String {
        const INDENT: &str = "  ";
        let indent_of = |sections: usize| if sections == 0 { "" } else { INDENT };
        let (mut width, mut sections) = (0, 0);
        for line in &self.lines {
            match line {
                Line::Section(_) => sections += 1,
                Line::Field(name, _) => {
                    width = width.max(indent_of(sections).len() + name.chars().count() + 1)
                }
            }
        }
        let (mut text, mut sections) = (String::new(), 0);
        for line in &self.lines {
            match line {
                Line::Section(title) => {
                    text.push_str(&format!("\n{title}\n"));
                    sections += 1;
                }
                Line::Field(name, value) => {
                    let label = format!("{}{name}:", indent_of(sections));
                    text.push_str(&format!("{label:width$}{GAP}{}\n", clean(value)));
                }
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 3] = [col("NAME"), wide("ID"), col("PHASE")];

    fn row(cells: [&str; 3]) -> Vec<String> {
        cells.map(str::to_owned).to_vec()
    }

    #[test]
    fn columns_line_up_and_wide_shows_all() {
        let rows = [row(["web-1", "x", "running"]), row(["database", "y", ""])];
        assert_eq!(
            Table::new(&COLUMNS, false).whole(&rows),
            "NAME      PHASE\nweb-1     running\ndatabase  -\n"
        );
        assert_eq!(Table::new(&COLUMNS, true).whole(&rows[..1]), "NAME   ID  PHASE\nweb-1  x   running\n");
        assert_eq!(Table::new(&COLUMNS, false).whole(&[]), "NAME  PHASE\n");
    }

    #[test]
    fn later_rows_keep_the_columns() {
        let mut table = Table::new(&COLUMNS, false);
        table.whole(&[row(["database", "", "running"])]);
        assert_eq!(table.row(&row(["web", "", "stopped"])), "web       stopped\n");
    }

    #[test]
    fn a_cell_cannot_leave_its_line() {
        let text = Table::new(&COLUMNS, false).whole(&[row(["a\n\u{1b}[2Jb", "", "grün"])]);
        assert_eq!(text.lines().count(), 2);
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn fields_have_sections() {
        let mut fields = Fields::default();
        fields.field("Name", "web").section("Status").field("Phase", "running").maybe("Node", None::<String>);
        assert_eq!(fields.text(), "Name:     web\n\nStatus\n  Phase:  running\n");
    }
}
