package metrics

import (
	"cmp"
	"log/slog"
	"net/http"
	"time"

	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/reflection"
)

// common has the metrics that agent and server share: of the process, of its gRPC
// services and of minting.
type common struct {
	registry     *prometheus.Registry
	grpc         *grpcprom.ServerMetrics
	log          *slog.Logger
	mints        *prometheus.CounterVec
	mintDuration *prometheus.HistogramVec
}

// newCommon returns the registry with the two metrics of minting. The counter has every
// series from the start. The histogram has only the usual ones, because one for each code
// would make hundreds of series.
func newCommon(log *slog.Logger, mints string, duration prometheus.HistogramOpts, help string) common {
	log = cmp.Or(log, slog.New(slog.DiscardHandler))
	labels := []string{"svid_type", "status_code"}
	c := common{
		registry:     prometheus.NewRegistry(),
		grpc:         grpcprom.NewServerMetrics(),
		log:          log,
		mints:        prometheus.NewCounterVec(prometheus.CounterOpts{Name: mints, Help: help}, labels),
		mintDuration: prometheus.NewHistogramVec(duration, labels),
	}
	c.registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		c.grpc, c.mints, c.mintDuration,
	)
	for _, typ := range []string{TypeX509, TypeJWT} {
		for code := codes.OK; code <= codes.Unauthenticated; code++ {
			c.mints.WithLabelValues(typ, code.String())
		}
		c.mintDuration.WithLabelValues(typ, codes.OK.String())
	}
	return c
}

// info registers spirl_application_info, one series for each deployment.
func (c *common) info(component, trustDomain, version string, deployments ...string) {
	g := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "spirl_application_info",
		Help: "Always 1. The labels say which trust domain and deployment this process serves, and its version.",
	}, []string{"spirl_trust_domain", "spirl_trust_domain_deployment", "spirl_app_version", "spirl_component"})
	for _, d := range deployments {
		g.WithLabelValues(text(trustDomain), text(d), text(version), component).Set(1)
	}
	c.registry.MustRegister(g)
}

// Minted counts one attempt to obtain or sign an SVID. svidType is [TypeX509] or
// [TypeJWT], code the gRPC status as codes.Code prints it, d the time from generating the
// key to the parsed answer, or from the request to its durable record. Each item of a
// batch is one attempt that took as long as the batch.
func (c *common) Minted(svidType, code string, d time.Duration) {
	c.mints.WithLabelValues(svidType, code).Inc()
	c.mintDuration.WithLabelValues(svidType, code).Observe(d.Seconds())
}

// Registry returns the registry, in which a caller may register metrics of its own.
func (c *common) Registry() *prometheus.Registry { return c.registry }

// ServerOptions returns the interceptors for the grpc_server_ metrics. Several gRPC servers
// may share them and are counted together.
func (c *common) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(c.grpc.UnaryServerInterceptor()),
		grpc.ChainStreamInterceptor(c.grpc.StreamServerInterceptor()),
	}
}

// InitServer creates the grpc_server_ series of every RPC of s at 0. Call it after the
// services are registered.
func (c *common) InitServer(s reflection.ServiceInfoProvider) { c.grpc.InitializeMetrics(s) }

// Handler returns the handler of /metrics. A series that cannot be exported does not
// affect the others.
func (c *common) Handler() http.Handler {
	return promhttp.HandlerFor(c.registry, promhttp.HandlerOpts{
		ErrorLog:      slog.NewLogLogger(c.log.Handler(), slog.LevelWarn),
		ErrorHandling: promhttp.ContinueOnError,
		Registry:      c.registry,
	})
}
