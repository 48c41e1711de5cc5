package metrics

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/exporter-toolkit/web"
)

// DefaultAddress is the default address of an agent's [Serve]. It is not reachable from
// other machines. A scraper elsewhere needs another address, which should have a web
// config file.
const DefaultAddress = "127.0.0.1:9090"

// shutdownTimeout is how long requests in flight may take after the context of [Serve]
// has ended.
const shutdownTimeout = 3 * time.Second

// ServeConfig is what [Serve] needs.
type ServeConfig struct {
	// Listener is used if set, and closed by Serve. Otherwise Serve listens on
	// Address; empty means [DefaultAddress].
	Listener net.Listener
	Address  string
	// WebConfigFile is a Prometheus exporter web configuration file, which enables
	// TLS and basic auth for all paths. Empty means plain HTTP.
	WebConfigFile string
	// Metrics is a [Metrics] or a [Server], served on /metrics.
	Metrics interface{ Handler() http.Handler }
	// Live and Ready decide the answer of /live and /ready: 200 if they return nil,
	// 503 with the error's text otherwise. nil means always 200. They must return
	// soon and be safe for concurrent use.
	Live, Ready func() error
	// ConnState is that of [http.Server]; nil means none.
	ConnState func(net.Conn, http.ConnState)
	Log       *slog.Logger // nil means no log
}

// Listen opens the listener that [Serve] would open. Use it with [ServeConfig.Listener] to
// fail on a bad address before anything else starts.
func Listen(address string) (net.Listener, error) {
	if address == "" {
		address = DefaultAddress
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen for metrics: %w", err)
	}
	return l, nil
}

// CheckWebConfig validates the file as [Serve] would, with the certificates that it names.
// An empty path is valid.
func CheckWebConfig(path string) error {
	if err := web.Validate(path); err != nil {
		return fmt.Errorf("web config file %s: %w", path, err)
	}
	return nil
}

// warnings drops the toolkit's log lines below warnings: Serve logs the address itself.
type warnings struct{ slog.Handler }

func (w warnings) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn && w.Handler.Enabled(ctx, level)
}

// Serve answers /metrics, /live and /ready until ctx ends, gives requests in flight a
// short time to finish and returns nil. It returns an error if it cannot serve.
func Serve(ctx context.Context, cfg ServeConfig) error {
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	l := cfg.Listener
	if l == nil {
		var err error
		if l, err = Listen(cfg.Address); err != nil {
			return err
		}
		cfg.Log.Info("metrics listening", "address", l.Addr().String(), "web_config_file", cfg.WebConfigFile)
	}
	srv := &http.Server{
		Handler:           handler(cfg),
		ConnState:         cfg.ConnState,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() {
		done <- web.Serve(l, srv, &web.FlagConfig{WebConfigFile: &cfg.WebConfigFile}, slog.New(warnings{cfg.Log.Handler()}))
	}()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if srv.Shutdown(stop) != nil {
			_ = srv.Close() // closes the connections left; Shutdown has closed the listener
		}
		err = <-done
	}
	// A bad web config file makes web.Serve return without having used l.
	_ = l.Close()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve metrics: %w", err)
}

func handler(cfg ServeConfig) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", cfg.Metrics.Handler())
	mux.Handle("GET /live", probe(cfg.Live))
	mux.Handle("GET /ready", probe(cfg.Ready))
	return mux
}

// probe answers an HTTP probe of Kubernetes.
func probe(check func() error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if check != nil {
			if err := check(); err != nil {
				w.WriteHeader(http.StatusServiceUnavailable)
				_, _ = io.WriteString(w, err.Error()+"\n")
				return
			}
		}
		_, _ = io.WriteString(w, "ok\n")
	})
}
