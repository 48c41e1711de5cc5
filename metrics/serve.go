package metrics

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/exporter-toolkit/web"
)

// DefaultAddress is the default address of an agent's [NewHTTPServer]. It is not reachable
// from other machines. A scraper elsewhere needs another address, which should have a web
// config file.
const DefaultAddress = "127.0.0.1:9090"

// HTTPConfig is what [NewHTTPServer] needs.
type HTTPConfig struct {
	// WebConfigFile is a Prometheus exporter web configuration file, which enables
	// TLS and basic auth for all paths. Empty means plain HTTP.
	WebConfigFile string
	// Metrics is a [Metrics] or a [Server], served on /metrics.
	Metrics interface{ Handler() http.Handler }
	// Ready decides the answer of /ready: 200 if it returns nil, 503 with the error's
	// text otherwise. It must return soon and be safe for concurrent use.
	Ready func() error
	Log   *slog.Logger // nil means no log
}

// CheckWebConfig validates the file as the server would, with the certificates that it names.
// An empty path is valid.
func CheckWebConfig(path string) error {
	if err := web.Validate(path); err != nil {
		return fmt.Errorf("web config file %s: %w: give a web configuration file of Prometheus exporters, with the files that it names", path, err)
	}
	return nil
}

// warnings drops the toolkit's log lines below warnings: the caller logs the address.
type warnings struct{ slog.Handler }

func (w warnings) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn && w.Handler.Enabled(ctx, level)
}

// NewHTTPServer returns the server of /metrics, /live and /ready, and the function that
// serves it on a listener. That one fails if the web config file cannot be used.
func NewHTTPServer(cfg HTTPConfig) (srv *http.Server, serve func(net.Listener) error) {
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", cfg.Metrics.Handler())
	mux.Handle("GET /live", probe(func() error { return nil }))
	mux.Handle("GET /ready", probe(cfg.Ready))
	srv = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
	}
	return srv, func(l net.Listener) error {
		return web.Serve(l, srv, &web.FlagConfig{WebConfigFile: &cfg.WebConfigFile}, slog.New(warnings{cfg.Log.Handler()}))
	}
}

// probe answers an HTTP probe of Kubernetes.
func probe(check func() error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if err := check(); err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = io.WriteString(w, err.Error()+"\n")
			return
		}
		_, _ = io.WriteString(w, "ok\n")
	})
}
