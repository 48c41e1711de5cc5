package metrics

import (
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

// common is what agent and server have alike: the registry, what is known of
// the process, of its gRPC services and of SVIDs being minted.
type common struct {
	registry     *prometheus.Registry
	grpc         *grpcprom.ServerMetrics
	log          *slog.Logger
	mints        *prometheus.CounterVec
	mintDuration *prometheus.HistogramVec
}

// newCommon makes the registry with the two metrics of minting. The counter has
// every series from the start, and the histogram only its usual ones: one for
// each code would be hundreds.
func newCommon(log *slog.Logger, mints string, duration prometheus.HistogramOpts, help string) common {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
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

// info makes the constant series that say what runs here, one for each
// deployment.
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

func (c *common) minted(svidType, code string, d time.Duration) {
	c.mints.WithLabelValues(svidType, code).Inc()
	c.mintDuration.WithLabelValues(svidType, code).Observe(d.Seconds())
}

// Registry returns the registry, for a caller with a metric of its own.
func (c *common) Registry() *prometheus.Registry { return c.registry }

// ServerOptions returns the interceptors that fill the grpc_server_ metrics.
// Several gRPC servers may have them and are counted together.
func (c *common) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(c.grpc.UnaryServerInterceptor()),
		grpc.ChainStreamInterceptor(c.grpc.StreamServerInterceptor()),
	}
}

// InitServer makes the grpc_server_ series of every RPC of s at 0. Call it once
// the services are registered.
func (c *common) InitServer(s reflection.ServiceInfoProvider) { c.grpc.InitializeMetrics(s) }

// Handler answers scrapes. A state that cannot be exported leaves out its own
// series and not the rest.
func (c *common) Handler() http.Handler {
	return promhttp.HandlerFor(c.registry, promhttp.HandlerOpts{
		ErrorLog:      slog.NewLogLogger(c.log.Handler(), slog.LevelWarn),
		ErrorHandling: promhttp.ContinueOnError,
		Registry:      c.registry,
	})
}
