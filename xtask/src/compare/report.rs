//! Ratios from rates.

use std::fmt::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

/// Tokens per second in what `mach bench decode|prefill --json` printed.
pub fn mach_rate(json: &[u8]) -> Result<f64> {
    let facts: Value = serde_json::from_slice(json).context("mach bench printed no JSON")?;
    facts["tok_s"].as_f64().filter(|r| *r > 0.0).context("mach bench printed no tok_s")
}

/// A peer in its fastest setting.
pub struct Rates {
    path: String,
    setting: String,
    pub rates: Vec<f64>,
}

/// One phase, a rate per round.
pub struct Row {
    name: String,
    pub mach: Vec<f64>,
    pub peers: Vec<Rates>,
}

impl Row {
    pub fn new(name: &str, peers: Vec<(String, String)>) -> Self {
        let peers = peers.into_iter().map(|(path, setting)| Rates { path, setting, rates: Vec::new() }).collect();
        Self { name: name.to_owned(), mach: Vec::new(), peers }
    }

    fn fastest(&self) -> Option<&Rates> {
        self.peers.iter().filter(|p| !p.rates.is_empty()).max_by(|a, b| median(&a.rates).total_cmp(&median(&b.rates)))
    }

    /// mach against `peer`: the ratio of medians, least and largest ratio of a round.
    fn ratio(&self, peer: &Rates) -> (f64, [f64; 2]) {
        let rounds = self.mach.iter().zip(&peer.rates).map(|(m, p)| m / p);
        let spread = rounds.fold([f64::INFINITY, 0.0], |s: [f64; 2], r| [s[0].min(r), s[1].max(r)]);
        (median(&self.mach) / median(&peer.rates), spread)
    }

    fn json(&self) -> Result<Value> {
        let fastest = self.fastest().with_context(|| format!("no peer completes {}", self.name))?;
        let of = |p: &Rates| {
            let (ratio, spread) = self.ratio(p);
            json!({"llama_bench": p.path, "setting": p.setting, "tok_s": median(&p.rates), "ratio": ratio, "spread": spread})
        };
        let (ratio, spread) = self.ratio(fastest);
        let peers: Vec<Value> = self.peers.iter().filter(|p| !p.rates.is_empty()).map(of).collect();
        Ok(json!({"mach": median(&self.mach), "peer": median(&fastest.rates), "ratio": ratio, "spread": spread, "peers": peers}))
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = |rates: &[f64]| rates.last().map_or_else(|| "-".to_owned(), |r| format!("{r:.2}"));
        write!(f, "mach {}", last(&self.mach))?;
        self.peers.iter().try_for_each(|p| write!(f, ", {} {}", p.path, last(&p.rates)))
    }
}

/// Everything that was compared.
pub struct Report {
    model: String,
    limit: Option<&'static str>,
    pub rows: Vec<Row>,
}

impl Report {
    pub fn new(model: &Path, limit: Option<&'static str>) -> Self {
        Self { model: model.display().to_string(), limit, rows: Vec::new() }
    }

    pub fn json(&self) -> Result<Value> {
        let rows = self.rows.iter().map(|r| Ok((r.name.clone(), r.json()?))).collect::<Result<Map<_, _>>>()?;
        let mut all = Value::Object(rows);
        all["model"] = json!(self.model);
        all["memory_limit_by"] = json!(self.limit);
        Ok(all)
    }

    pub fn table(&self) -> Result<String> {
        let mut out = format!("{}\n{:<14} {:>9} {:>9} {:>7}  {:<15} peer\n", self.model, "tokens/s", "mach", "peer", "ratio", "spread");
        for row in &self.rows {
            for p in row.peers.iter().filter(|p| !p.rates.is_empty()) {
                let (ratio, [least, most]) = row.ratio(p);
                let (mach, peer, spread) = (median(&row.mach), median(&p.rates), format!("{least:.2} to {most:.2}"));
                writeln!(out, "{:<14} {mach:>9.2} {peer:>9.2} {ratio:>7.2}  {spread:<15} {}, {}", row.name, p.path, p.setting)?;
            }
        }
        Ok(out)
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects the figures: the fastest peer counts, the ratio is that of medians, the spread that of rounds.
    #[test]
    fn ratios_are_against_the_fastest_peer() {
        let mut row = Row::new("decode", vec![("a".to_owned(), "x".to_owned()), ("b".to_owned(), "y".to_owned()), ("c".to_owned(), "z".to_owned())]);
        row.mach = vec![20.0, 30.0, 24.0];
        row.peers[0].rates = vec![5.0, 5.0, 6.0];
        row.peers[1].rates = vec![10.0, 12.0, 12.0];
        let mut report = Report::new(Path::new("m.gguf"), None);
        report.rows.push(row);
        let json = report.json().unwrap();
        assert_eq!((&json["decode"]["mach"], &json["decode"]["peer"], &json["decode"]["ratio"]), (&json!(24.0), &json!(12.0), &json!(2.0)));
        assert_eq!(json["decode"]["spread"], json!([2.0, 2.5]));
        assert_eq!(json["decode"]["peers"].as_array().unwrap().len(), 2, "a peer that never completes is left out");
    }

    /// Protects the reading of mach's own figures.
    #[test]
    fn the_rate_of_mach_is_tok_s() {
        assert_eq!(mach_rate(br#"{"tok_s":41.6,"spread":[40.0,42.7]}"#).unwrap(), 41.6);
        assert!(mach_rate(br#"{"tok_s":null}"#).is_err() && mach_rate(b"").is_err());
    }
}
