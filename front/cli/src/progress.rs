//! What users see while they wait: bars on a terminal, plain lines elsewhere, always on stderr.

use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use kiln::image::{Event, Progress};

use crate::Context;
use crate::terminal::{note, printable};

/// How often a spinner turns.
const TICK: Duration = Duration::from_millis(120);

/// Progress as this context shows it.
pub(crate) fn of_pull(context: &Context) -> Arc<dyn Progress> {
    if context.global.quiet {
        Arc::new(())
    } else if std::io::stderr().is_terminal() {
        Arc::new(Bar::default())
    } else {
        Arc::new(Lines::default())
    }
}

/// A line with a spinner, until the last clone of what is returned is dropped. Where there is no terminal, only the steps
/// that take long are shown, a line each.
pub(crate) fn spinner(context: &Context, text: String) -> Spinner {
    let is_terminal = std::io::stderr().is_terminal();
    let shown = !context.global.quiet && context.global.verbose == 0 && is_terminal;
    let bar = shown.then(|| spinning(text.clone()));
    Spinner(Arc::new(Spinning { bar, text, lines: !context.global.quiet && !shown }))
}

/// A line with a spinner that goes away with this.
#[derive(Clone, Debug)]
pub(crate) struct Spinner(Arc<Spinning>);

#[derive(Debug)]
struct Spinning {
    bar: Option<ProgressBar>,
    text: String,
    lines: bool,
}

impl Spinner {
    /// Shows a step that takes long.
    pub(crate) fn step(&self, text: &str) {
        match &self.0.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None if self.0.lines => note(text),
            None => {}
        }
    }

    /// Shows the text it began with.
    pub(crate) fn back(&self) {
        if let Some(bar) = &self.0.bar {
            bar.set_message(self.0.text.clone());
        }
    }
}

impl Drop for Spinning {
    fn drop(&mut self) {
        clear(&mut self.bar);
    }
}

/// What is known of a pull's layers: how many bytes each has and how many of them came.
#[derive(Debug, Default)]
struct Layers {
    name: String,
    sizes: Vec<u64>,
    came: Vec<u64>,
    missing: usize,
    done: usize,
}

impl Layers {
    fn take(&mut self, event: &Event<'_>) {
        match event {
            Event::Resolving { name } => (*name).clone_into(&mut self.name),
            Event::Resolved { layers, .. } => {
                let travels = layers.iter().filter(|layer| !layer.present);
                self.missing = travels.clone().count();
                self.sizes = layers.iter().map(|layer| if layer.present { 0 } else { layer.bytes }).collect();
                self.came = vec![0; layers.len()];
            }
            Event::LayerProgress { layer, bytes } => {
                if let (Some(came), Some(size)) = (self.came.get_mut(*layer), self.sizes.get(*layer)) {
                    *came = (*bytes).min(*size);
                }
            }
            Event::LayerDone { layer } => {
                if let (Some(came), Some(size)) = (self.came.get_mut(*layer), self.sizes.get(*layer))
                    && *size > 0
                {
                    *came = *size;
                    self.done += 1;
                }
            }
            _ => {}
        }
    }

    fn total_bytes(&self) -> u64 {
        self.sizes.iter().sum()
    }

    fn came_bytes(&self) -> u64 {
        self.came.iter().sum()
    }
}

/// One bar for all of a pull.
#[derive(Debug, Default)]
struct Bar {
    state: Mutex<(Layers, Option<ProgressBar>)>,
}

impl Progress for Bar {
    fn event(&self, event: Event<'_>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (layers, bar) = &mut *state;
        layers.take(&event);
        match event {
            Event::Resolving { name } => *bar = Some(spinning(format!("resolving {name}"))),
            Event::Resolved { .. } if layers.missing > 0 => {
                clear(bar);
                let style = ProgressStyle::with_template(
                    "{msg} [{bar:30}] {bytes}/{total_bytes} {binary_bytes_per_sec} {prefix}",
                )
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("=> ");
                let fresh = ProgressBar::new(layers.total_bytes()).with_style(style);
                *bar = Some(fresh.with_message(layers.name.clone()));
            }
            Event::Merging => {
                clear(bar);
                *bar = Some(spinning(format!("making {} ready", layers.name)));
            }
            Event::Done { .. } => clear(bar),
            Event::Retrying { what, why, after } => {
                if let Some(bar) = bar {
                    bar.println(retry_line(what, why, after));
                }
            }
            _ => {}
        }
        if let Some(bar) = bar
            && layers.missing > 0
        {
            bar.set_position(layers.came_bytes());
            bar.set_prefix(format!("({}/{} layers)", layers.done, layers.missing));
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        clear(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).1);
    }
}

fn spinning(text: String) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(text);
    bar.enable_steady_tick(TICK);
    bar
}

fn clear(bar: &mut Option<ProgressBar>) {
    if let Some(bar) = bar.take() {
        bar.finish_and_clear();
    }
}

fn retry_line(what: &str, why: &str, after: Duration) -> String {
    format!("retrying {what} in {:.1} s: {}", after.as_secs_f32(), printable(why))
}

/// A line for each thing that took its time; none when the store had everything.
#[derive(Debug, Default)]
struct Lines {
    layers: Mutex<Layers>,
}

impl Progress for Lines {
    fn event(&self, event: Event<'_>) {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        layers.take(&event);
        let line = match event {
            Event::Resolved { .. } if layers.missing > 0 => format!(
                "pulling {}: {} layers, {}",
                layers.name,
                layers.missing,
                HumanBytes(layers.total_bytes())
            ),
            Event::LayerDone { layer } if layers.sizes.get(layer).is_some_and(|size| *size > 0) => {
                format!("layer {}/{} done, {}", layers.done, layers.missing, HumanBytes(layers.sizes[layer]))
            }
            Event::Retrying { what, why, after } => retry_line(what, why, after),
            _ => return,
        };
        // Progress that cannot be shown is no reason to stop.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}
