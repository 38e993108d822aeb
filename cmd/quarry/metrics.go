package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// collectLimit is how long asking the domains for one scrape may take.
const collectLimit = 5 * time.Second

// metrics of this process, in a registry of their own.
type metrics struct {
	registry   *prometheus.Registry
	operations *prometheus.CounterVec
	failures   *prometheus.CounterVec
	durations  *prometheus.HistogramVec
	engines    *prometheus.CounterVec
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		operations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "quarry_operations_total", Help: "Operations of the Image Manager that ended, by the way they took.",
		}, []string{"op", "domain", "path"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "quarry_operation_failures_total", Help: "Operations of the Image Manager that failed, by the kind of error.",
		}, []string{"op", "domain", "kind"}),
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "quarry_operation_duration_seconds", Help: "How long operations of the Image Manager took.",
			// 1 ms to 4.6 hours: from a tag to the copy of a large volume.
			Buckets: prometheus.ExponentialBuckets(0.001, 4, 13),
		}, []string{"op", "domain", "path"}),
		engines: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "quarry_engine_starts_total", Help: "Processes that were started for engines which have their own: more than one is a restart.",
		}, []string{"domain"}),
	}
	m.registry.MustRegister(m.operations, m.failures, m.durations, m.engines, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "quarry_build_info", Help: "Always 1.", ConstLabels: prometheus.Labels{"version": version},
		}, func() float64 { return 1 }))
	return m
}

// observe is image.Config.Observe.
func (m *metrics) observe(op, domain, path string, took time.Duration, err error) {
	m.operations.WithLabelValues(op, domain, path).Inc()
	m.durations.WithLabelValues(op, domain, path).Observe(took.Seconds())
	if err != nil {
		m.failures.WithLabelValues(op, domain, fault.KindOf(err).String()).Inc()
	}
}

// engineStarted is storages.started.
func (m *metrics) engineStarted(domain string) { m.engines.WithLabelValues(domain).Inc() }

// watchDomains and watchHost add what is asked for at each scrape.
func (m *metrics) watchDomains(d domainLister) { m.registry.MustRegister(newDomainCollector(d)) }

func (m *metrics) watchHost(a interface {
	Abandoned() int
	Paused() int
}) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "quarry_abandoned_calls", Help: "System calls that hang on storage that does not answer.",
	}, func() float64 { return float64(a.Abandoned()) }), prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "quarry_paused_layers", Help: "Layers in use on this node whose reads and writes wait, because their storage is nearly full.",
	}, func() float64 { return float64(a.Paused()) }))
}

// domainsOf tells of the domains that are not open.
func domainsOf(d domainLister) func(ctx context.Context, w io.Writer) {
	return func(ctx context.Context, w io.Writer) {
		for _, info := range d.Domains(ctx) {
			if !info.Open {
				fmt.Fprintf(w, "domain %s is not open: %s\n", info.Config.Name, info.Problem)
			}
		}
	}
}

// handler serves /metrics, /healthz (this process answers) and /readyz (it
// has tried every domain once; what else tell says is no failure).
func (m *metrics) handler(ready *atomic.Bool, tell func(ctx context.Context, w io.Writer)) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		if !ready.Load() {
			http.Error(w, "not ready: still starting, or another process works", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
		ctx, cancel := context.WithTimeout(r.Context(), collectLimit)
		defer cancel()
		tell(ctx, w)
	})
	return mux
}

type domainLister interface {
	Domains(ctx context.Context) []image.DomainInfo
}

// domainCollector reads the gauges of domains at each scrape.
type domainCollector struct {
	domains                                                      domainLister
	open, images, operations, promised, capacity, storage, epoch *prometheus.Desc
}

func newDomainCollector(d domainLister) *domainCollector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, append([]string{"domain"}, labels...), nil)
	}
	return &domainCollector{
		domains:    d,
		open:       desc("quarry_domain_open", "1 if the domain is open."),
		images:     desc("quarry_images", "Images that users see.", "kind"),
		operations: desc("quarry_operations_running", "Operations under way or being retried."),
		promised:   desc("quarry_domain_promised_bytes", "Sum of the sizes of all images."),
		capacity:   desc("quarry_domain_capacity_bytes", "What can still be promised."),
		storage:    desc("quarry_domain_storage_bytes", "What the storage itself counts.", "state"),
		epoch:      desc("quarry_domain_epoch", "The epoch of this process."),
	}
}

func (c *domainCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.open, c.images, c.operations, c.promised, c.capacity, c.storage, c.epoch} {
		ch <- d
	}
}

func (c *domainCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), collectLimit)
	defer cancel()
	for _, d := range c.domains.Domains(ctx) {
		id := d.ID
		if id == "" {
			id = d.Config.Name
		}
		gauge := func(desc *prometheus.Desc, v float64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, v, append([]string{id}, labels...)...)
		}
		if !d.Open {
			gauge(c.open, 0)
			continue
		}
		gauge(c.open, 1)
		gauge(c.images, float64(d.Volumes), "volume")
		gauge(c.images, float64(d.Snapshots), "snapshot")
		gauge(c.operations, float64(d.Operations))
		gauge(c.promised, float64(d.Promised))
		gauge(c.capacity, float64(d.Capacity))
		gauge(c.epoch, float64(d.Epoch))
		if u := d.Usage; u != nil {
			gauge(c.storage, float64(u.Used), "used")
			gauge(c.storage, float64(u.Available), "available")
			gauge(c.storage, float64(u.Total), "total")
		}
	}
}
