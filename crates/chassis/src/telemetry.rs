//! Logs to stderr, the trace that a line belongs to, and the metrics of the process.
//!
//! Traces are carried (W3C `traceparent`), not exported: each span has an OpenTelemetry context, so that what is
//! logged by several processes for one request shares one id.

use std::fmt;
use std::io::IsTerminal;
use std::sync::{Arc, PoisonError, RwLock};

use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::{FmtSpan, Format, Json, JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// Which lines are logged, in tracing-subscriber's syntax: `info,kiln_bus=debug`.
pub const FILTER_VARIABLE: &str = "KILN_LOG";
/// `json` or `text`.
pub const FORMAT_VARIABLE: &str = "KILN_LOG_FORMAT";

/// Without [`FILTER_VARIABLE`]. The bus's client says at `info` what the bus says itself, in a user's words.
const DEFAULT_FILTER: &str = "info,async_nats=warn";

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Json,
    Text,
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub filter: String,
    pub format: LogFormat,
}

/// Why there are no logs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{FORMAT_VARIABLE} is `{0}`: expected json or text")]
    UnknownFormat(String),
    #[error("{FILTER_VARIABLE} is no filter: {0}")]
    NoFilter(tracing_subscriber::filter::ParseError),
    #[error("this process logs already")]
    Installed,
}

impl Settings {
    /// From [`FILTER_VARIABLE`] and [`FORMAT_VARIABLE`]; without them from `info` on, as JSON unless stderr is a terminal.
    pub fn of_process() -> Result<Self, Error> {
        let unspecified = if std::io::stderr().is_terminal() { LogFormat::Text } else { LogFormat::Json };
        let format = match variable(FORMAT_VARIABLE).as_deref() {
            None => unspecified,
            Some("json") => LogFormat::Json,
            Some("text") => LogFormat::Text,
            Some(other) => return Err(Error::UnknownFormat(other.to_owned())),
        };
        Ok(Self { filter: variable(FILTER_VARIABLE).unwrap_or_else(|| DEFAULT_FILTER.to_owned()), format })
    }
}

fn variable(name: &str) -> Option<String> {
    #[expect(clippy::disallowed_methods, reason = "telemetry is set up before there is a configuration")]
    let value = std::env::var(name).ok();
    value.filter(|value| !value.is_empty())
}

/// Makes this process log to stderr and carry traces. Once, before anything else logs.
pub fn install(settings: &Settings) -> Result<(), Error> {
    opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
    subscriber(settings, std::io::stderr, std::io::stderr().is_terminal())?
        .try_init()
        .map_err(|_already| Error::Installed)
}

fn subscriber<W>(
    settings: &Settings,
    writer: W,
    ansi: bool,
) -> Result<impl Subscriber + Send + Sync + 'static, Error>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(&settings.filter).map_err(Error::NoFilter)?;
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_span_events(FmtSpan::NONE);
    let lines = match settings.format {
        LogFormat::Json => {
            let line: Format<Json> =
                Format::default().json().flatten_event(true).with_current_span(true).with_span_list(false);
            lines.with_ansi(false).fmt_fields(JsonFields::new()).event_format(Traced::json(line)).boxed()
        }
        LogFormat::Text => {
            lines.with_ansi(ansi).event_format(Traced::text(Format::default().with_ansi(ansi))).boxed()
        }
    };
    // The filter is of the lines alone: spans keep their trace also where they aren't logged.
    let tracer = SdkTracerProvider::builder().build().tracer("kiln");
    let traces = tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_filter(tracing_subscriber::filter::LevelFilter::INFO);
    Ok(tracing_subscriber::registry().with(traces).with(lines.with_filter(filter)))
}

/// A process's metrics. Each part of the process has a registry of its own, and adds it once it has registered what
/// it counts; there are no global metrics. Clones share the registries.
#[derive(Clone, Debug)]
pub struct Metrics {
    registries: Arc<RwLock<Vec<Registry>>>,
}

impl Metrics {
    /// With `kiln_build_info` alone.
    pub fn new(version: &str) -> Self {
        let mut registry = Registry::with_prefix("kiln");
        let info = Info::new(vec![("version".to_owned(), version.to_owned())]);
        registry.register("build", "What this process was built from", info);
        Self { registries: Arc::new(RwLock::new(vec![registry])) }
    }

    /// An empty registry for a part, `kiln_<part>_…`: the same names whatever other parts share the process.
    pub fn part(part: &str) -> Registry {
        Registry::with_prefix(format!("kiln_{}", part.replace('-', "_")))
    }

    /// Shows what is registered there from now on.
    pub fn add(&self, registry: Registry) {
        self.registries.write().unwrap_or_else(PoisonError::into_inner).push(registry);
    }

    /// All of it, in the OpenMetrics text format.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        for registry in self.registries.read().unwrap_or_else(PoisonError::into_inner).iter() {
            encode_registry(&mut text, registry)?;
        }
        encode_eof(&mut text)?;
        Ok(text)
    }
}

/// An event's format with the trace id added to it.
struct Traced<F> {
    line: F,
    insert: fn(&str, &str) -> String,
}

impl Traced<Format<Json>> {
    fn json(line: Format<Json>) -> Self {
        let insert = |line: &str, trace: &str| {
            format!("{{\"trace_id\":\"{trace}\",{}", line.strip_prefix('{').unwrap_or(line))
        };
        Self { line, insert }
    }
}

impl Traced<Format> {
    fn text(line: Format) -> Self {
        let insert = |line: &str, trace: &str| format!("{} trace_id={trace}\n", line.trim_end());
        Self { line, insert }
    }
}

impl<S, N, F> FormatEvent<S, N> for Traced<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        // Not the span's own extensions: the filter of the lines may hide the span, but not its trace.
        let current = opentelemetry::Context::current();
        let trace = current.span().span_context().trace_id();
        if trace == opentelemetry::trace::TraceId::INVALID {
            return self.line.format_event(context, writer, event);
        }
        let mut line = String::new();
        self.line.format_event(context, Writer::new(&mut line), event)?;
        writer.write_str(&(self.insert)(&line, &trace.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("the lines").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(filter: &str, format: LogFormat, act: impl FnOnce()) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let settings = Settings { filter: filter.into(), format };
        let subscriber = subscriber(&settings, move || writer.clone(), false).expect("a subscriber");
        tracing::subscriber::with_default(subscriber, act);
        let bytes = lines.0.lock().expect("the lines").clone();
        String::from_utf8(bytes).expect("UTF-8")
    }

    fn act() {
        let span = tracing::info_span!("asked", build.id = "b1");
        span.in_scope(|| tracing::warn!(slots = 3, "no slot is free"));
        tracing::warn!("outside");
    }

    #[test]
    fn a_json_line_says_its_trace() {
        for filter in ["info", "warn"] {
            let text = logged(filter, LogFormat::Json, act);
            let lines: Vec<serde_json::Value> =
                text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
            assert_eq!(lines.len(), 2, "{text}");
            assert_eq!(lines[0]["message"], "no slot is free");
            assert_eq!(lines[0]["slots"], 3);
            assert_eq!(lines[0]["trace_id"].as_str().map(str::len), Some(32), "{text}");
            assert_eq!(lines[1]["trace_id"], serde_json::Value::Null);
        }
    }

    #[test]
    fn a_text_line_says_its_trace() {
        let text = logged("info", LogFormat::Text, act);
        let (first, second) = text.split_once('\n').expect("two lines");
        assert!(first.contains("no slot is free slots=3 trace_id="), "{text}");
        assert!(!second.contains("trace_id"), "{text}");
    }

    #[test]
    fn a_filter_that_is_none_is_refused() {
        let settings = Settings { filter: "kiln=loud".into(), format: LogFormat::Text };
        let error = subscriber(&settings, std::io::sink, false).err().expect("refused");
        assert!(error.to_string().starts_with("KILN_LOG is no filter"), "{error}");
    }
}
