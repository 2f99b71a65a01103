//! `kiln top`: what VMs use, on a screen.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IsTerminal as _};

use kiln::detached::Machines;
use ratatui::Frame;
use ratatui::crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers, read};
use ratatui::layout::{Alignment, Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Cell, Row, Table};
use tokio::sync::mpsc;

use super::stats::{Meter, Usage, cells, timer};
use crate::failure::Failure;
use crate::signals::Signals;

/// Measurements that are kept of each VM, and the width of what shows them.
const HISTORY: usize = 24;
/// Keys that wait to be taken.
const KEYS_WAITING_MAX: usize = 16;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const HELP: &str = "q quit   sorted by: c CPU  m memory  p processes  n name";

/// What VMs are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Order {
    #[default]
    Cpu,
    Memory,
    Processes,
    Name,
}

/// What is on the screen.
#[derive(Debug, Default)]
struct Screen {
    usages: Vec<Usage>,
    /// Processor time of each VM in hundredths of what it may have, the newest last.
    history: BTreeMap<String, VecDeque<f64>>,
    order: Order,
}

/// Shows what VMs use until its user has seen enough, and returns the exit code.
///
/// # Errors
/// When there is no terminal, or the VMs cannot be listed.
pub(crate) async fn top(machines: &Machines) -> Result<u8, Failure> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Err(Failure::caller("this shows a screen and needs a terminal")
            .hint("kiln stats prints the same as lines"));
    }
    let mut signals = Signals::catch().map_err(Failure::host)?;
    let mut meter = Meter::default();
    // Before the screen is taken, so that a failure can be read.
    let mut screen = Screen::default();
    screen.show(meter.measure(machines, &[]).await?);
    // Restored before a panic is reported, too.
    let mut terminal = ratatui::try_init().map_err(Failure::host)?;
    let _restored = Restored;
    let mut keys = keys();
    let mut timer = timer();
    loop {
        terminal.draw(|frame| screen.draw(frame)).map_err(Failure::host)?;
        tokio::select! {
            _ = timer.tick() => screen.show(meter.measure(machines, &[]).await?),
            key = keys.recv() => match key {
                Some(Event::Key(key)) if screen.quits(key) => return Ok(0),
                Some(_) => {}
                // The terminal is gone.
                None => return Ok(0),
            },
            number = signals.fatal() => return Ok(128 + number),
        }
    }
}

/// The terminal goes back to how it was when this is dropped.
struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// What is typed, read by a thread that ends with this process.
fn keys() -> mpsc::Receiver<Event> {
    let (sender, keys) = mpsc::channel(KEYS_WAITING_MAX);
    std::thread::spawn(move || {
        while let Ok(event) = read() {
            if sender.blocking_send(event).is_err() {
                return;
            }
        }
    });
    keys
}

impl Screen {
    /// Takes what was measured.
    fn show(&mut self, usages: Vec<Usage>) {
        self.history.retain(|id, _| usages.iter().any(|usage| usage.id == *id));
        for usage in &usages {
            let history = self.history.entry(usage.id.clone()).or_default();
            let cpu = usage.figures.map_or(0.0, |figures| figures.cpu_percent);
            history.push_back(cpu / f64::from(usage.vcpus.max(1)));
            if history.len() > HISTORY {
                history.pop_front();
            }
        }
        self.usages = usages;
        self.sort();
    }

    /// Takes a key; whether it is one that ends this.
    fn quits(&mut self, key: KeyEvent) -> bool {
        if key.kind == KeyEventKind::Release {
            return false;
        }
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char('c') => self.order = Order::Cpu,
            KeyCode::Char('m') => self.order = Order::Memory,
            KeyCode::Char('p') => self.order = Order::Processes,
            KeyCode::Char('n') => self.order = Order::Name,
            _ => {}
        }
        self.sort();
        false
    }

    fn sort(&mut self) {
        let order = self.order;
        self.usages.sort_by(|a, b| {
            let by_figures = match (order, a.figures, b.figures) {
                (Order::Name, ..) | (_, None, None) => Ordering::Equal,
                (_, None, Some(_)) => Ordering::Greater,
                (_, Some(_), None) => Ordering::Less,
                (Order::Cpu, Some(a), Some(b)) => b.cpu_percent.total_cmp(&a.cpu_percent),
                (Order::Memory, Some(a), Some(b)) => b.memory_used_bytes.cmp(&a.memory_used_bytes),
                (Order::Processes, Some(a), Some(b)) => b.processes.cmp(&a.processes),
            };
            by_figures.then_with(|| a.name.cmp(&b.name))
        });
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let [title, table, help] =
            Layout::vertical([Constraint::Length(1), Constraint::Min(0), Constraint::Length(1)])
                .areas(frame.area());
        let count = self.usages.len();
        let heading = format!("kiln top: {count} VM{}", if count == 1 { "" } else { "s" });
        frame.render_widget(Line::styled(heading, Style::new().add_modifier(Modifier::BOLD)), title);
        frame.render_widget(self.table(), table);
        frame.render_widget(Line::styled(HELP, Style::new().add_modifier(Modifier::DIM)), help);
    }

    fn table(&self) -> Table<'_> {
        let widths = [
            Constraint::Fill(1),
            Constraint::Length(8),
            Constraint::Length(25),
            Constraint::Length(11),
            Constraint::Length(9),
            Constraint::Length(HISTORY as u16),
        ];
        let header = [
            (Order::Name, "NAME"),
            (Order::Cpu, "CPU"),
            (Order::Memory, "MEMORY"),
            (Order::Memory, "ON HOST"),
            (Order::Processes, "PROCESSES"),
        ];
        let header = header.into_iter().enumerate().map(|(index, (order, name))| {
            let is_sorted = order == self.order && name != "ON HOST";
            let style = if is_sorted { Style::new().add_modifier(Modifier::REVERSED) } else { Style::new() };
            aligned(index, name.to_owned()).style(style)
        });
        let header = header.chain([Cell::from("CPU SO FAR")]);
        let rows = self.usages.iter().map(|usage| {
            let words = [usage.name.clone()].into_iter().chain(cells(usage));
            let words = words.enumerate().map(|(index, word)| aligned(index, word));
            Row::new(words.chain([Cell::from(bars(self.history.get(&usage.id)))]).collect::<Vec<_>>())
        });
        Table::new(rows.collect::<Vec<_>>(), widths).header(Row::new(header)).column_spacing(2)
    }
}

/// A cell: names at the left, figures at the right.
fn aligned(index: usize, word: String) -> Cell<'static> {
    let alignment = if index == 0 { Alignment::Left } else { Alignment::Right };
    Cell::from(Text::from(word).alignment(alignment))
}

/// A bar for each measurement: all of what a VM may have is a whole one.
fn bars(history: Option<&VecDeque<f64>>) -> String {
    let bar = |percent: &f64| {
        let eighths = (percent / 100.0 * BARS.len() as f64).clamp(0.0, BARS.len() as f64 - 1.0);
        BARS[eighths as usize]
    };
    history.map(|history| history.iter().map(bar).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use kiln::detached::State;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::stats::tests::usage;
    use super::*;

    fn press(screen: &mut Screen, key: char) -> bool {
        screen.quits(KeyEvent::new(KeyCode::Char(key), KeyModifiers::NONE))
    }

    fn shown(screen: &Screen) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(110, 6)).expect("memory takes it");
        terminal.draw(|frame| screen.draw(frame)).expect("memory takes it");
        let buffer = terminal.backend().buffer().clone();
        let line = |row| (0..110).map(|column| buffer[(column, row)].symbol()).collect::<String>();
        (0..6).map(|row| line(row).trim_end().to_owned()).collect()
    }

    fn names(screen: &Screen) -> Vec<&str> {
        screen.usages.iter().map(|usage| usage.name.as_str()).collect()
    }

    #[test]
    fn keys_sort_and_quit() {
        let mut screen = Screen::default();
        let still = Usage { figures: None, state: State::Paused, ..usage("still", 0.0, 0, 0) };
        screen.show(vec![still, usage("a", 1.0, 30, 2), usage("b", 2.0, 10, 3), usage("c", 3.0, 20, 1)]);
        assert_eq!(names(&screen), ["c", "b", "a", "still"]);
        for (key, sorted) in [
            ('m', ["a", "c", "b", "still"]),
            ('p', ["b", "a", "c", "still"]),
            ('n', ["a", "b", "c", "still"]),
        ] {
            assert!(!press(&mut screen, key));
            assert_eq!(names(&screen), sorted, "{key}");
        }
        assert!(press(&mut screen, 'q'));
        assert!(screen.quits(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
    }

    #[test]
    fn the_screen_has_a_line_for_each_vm_with_its_past() {
        let mut screen = Screen::default();
        for cpu in [0.0, 50.0, 100.0, 400.0] {
            screen.show(vec![usage("web", cpu, 64 << 20, 7)]);
        }
        let lines = shown(&screen);
        assert_eq!(lines[0], "kiln top: 1 VM");
        assert!(lines[1].starts_with("NAME") && lines[1].ends_with("CPU SO FAR"), "{lines:?}");
        assert!(lines[2].starts_with("web") && lines[2].ends_with("▁▅██"), "{lines:?}");
        assert!(lines[2].contains("400.0%") && lines[2].contains("64.00 MiB / 512.00 MiB"), "{lines:?}");
        assert_eq!(lines[5], HELP);
        // What is gone is forgotten.
        screen.show(Vec::new());
        assert!(screen.history.is_empty());
        assert_eq!(shown(&screen)[2], "");
    }

    #[test]
    fn the_past_is_as_long_as_its_place() {
        let mut screen = Screen::default();
        for _ in 0..100 {
            screen.show(vec![usage("web", 10.0, 1, 1)]);
        }
        assert_eq!(bars(screen.history.values().next()).chars().count(), HISTORY);
    }
}
