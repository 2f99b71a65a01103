//! Figures as a table for people and as JSON for programs.

use std::fmt::Write as _;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use crate::host;

/// One quantity, measured several times.
#[derive(Debug)]
struct Series {
    name: String,
    unit: &'static str,
    values: Vec<f64>,
    failures: usize,
}

/// Everything one benchmark measured.
#[derive(Debug)]
pub(crate) struct Report {
    benchmark: String,
    facts: Vec<(&'static str, String)>,
    series: Vec<Series>,
    notes: Vec<String>,
}

impl Report {
    pub(crate) fn new(benchmark: &str) -> Self {
        Self { benchmark: benchmark.to_owned(), facts: host::facts(), series: Vec::new(), notes: Vec::new() }
    }

    /// Adds a value to the series of that name.
    pub(crate) fn add(&mut self, name: &str, unit: &'static str, value: f64) {
        self.series_mut(name, unit).values.push(value);
    }

    /// Does `work`, which moves `mib` MiB, and adds how long it took and at what rate.
    ///
    /// # Errors
    ///
    /// What `work` gives, named.
    pub(crate) fn timed(&mut self, name: &str, mib: f64, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let start = Instant::now();
        work().with_context(|| name.to_owned())?;
        let seconds = start.elapsed().as_secs_f64();
        self.add(name, "ms", seconds * 1e3);
        self.add(&format!("{name}, rate"), "MiB/s", mib / seconds);
        Ok(())
    }

    /// Counts a run that gave no value.
    pub(crate) fn fail(&mut self, name: &str, unit: &'static str) {
        self.series_mut(name, unit).failures += 1;
    }

    /// Says something the figures need to be understood.
    pub(crate) fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    fn series_mut(&mut self, name: &str, unit: &'static str) -> &mut Series {
        let at = self.series.iter().position(|series| series.name == name).unwrap_or_else(|| {
            self.series.push(Series { name: name.to_owned(), unit, values: Vec::new(), failures: 0 });
            self.series.len() - 1
        });
        &mut self.series[at]
    }

    /// The table.
    pub(crate) fn table(&self) -> String {
        let mut text = format!("{}\n", self.benchmark);
        for (name, value) in &self.facts {
            let _ = writeln!(text, "  {name:<12} {value}");
        }
        for note in &self.notes {
            let _ = writeln!(text, "  {note}");
        }
        let width = self.series.iter().map(|series| series.name.len()).max().unwrap_or(0);
        let _ = writeln!(
            text,
            "{:<width$}  {:>5} {:>10} {:>10} {:>10} {:>10}  unit  failures",
            "", "n", "min", "p50", "p99", "max"
        );
        for series in &self.series {
            let [min, p50, p99, max] = quantiles(&series.values).map(figure);
            let (name, n, unit, failures) = (&series.name, series.values.len(), series.unit, series.failures);
            let _ = writeln!(
                text,
                "{name:<width$}  {n:>5} {min:>10} {p50:>10} {p99:>10} {max:>10}  {unit:<4}  {failures}"
            );
        }
        text
    }

    /// The same as JSON, with every value.
    pub(crate) fn json(&self) -> String {
        let facts: Map<String, Value> =
            self.facts.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        let series: Vec<Value> = self
            .series
            .iter()
            .map(|series| {
                let [min, p50, p99, max] = quantiles(&series.values);
                json!({
                    "name": series.name, "unit": series.unit, "n": series.values.len(), "failures": series.failures,
                    "min": min, "p50": p50, "p99": p99, "max": max, "values": series.values,
                })
            })
            .collect();
        let whole =
            json!({"benchmark": self.benchmark, "host": facts, "notes": self.notes, "series": series});
        format!("{whole:#}\n")
    }
}

/// Least, median, 99th percentile and most, by the nearest rank.
fn quantiles(values: &[f64]) -> [f64; 4] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = |part: f64| {
        let at = (part * sorted.len() as f64).ceil() as usize;
        sorted.get(at.max(1) - 1).copied().unwrap_or(f64::NAN)
    };
    [rank(0.0), rank(0.5), rank(0.99), rank(1.0)]
}

/// Three digits that matter, or what is before the point.
fn figure(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(quantiles(&values).map(figure), ["1.00", "100", "198", "200"]);
        assert_eq!(quantiles(&[7.0]).map(figure), ["7.00"; 4]);
    }
}
