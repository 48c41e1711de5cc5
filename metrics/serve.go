package metrics

import (
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

// DefaultAddress is where an agent's [Serve] listens unless told otherwise. It is not
// reachable from other machines; a scraper elsewhere needs another address and
// should get a web config file with it.
const DefaultAddress = "127.0.0.1:9090"

// shutdownTimeout is how long requests in flight may take once the context of
// [Serve] has ended.
const shutdownTimeout = 3 * time.Second

// ServeConfig says where and what [Serve] answers.
type ServeConfig struct {
	// Listener is used when set, and closed by Serve. Otherwise Address is
	// listened on, [DefaultAddress] when empty.
	Listener net.Listener
	Address  string
	// WebConfigFile is a Prometheus exporter web configuration file, which
	// turns on TLS and basic auth for all paths. Plain HTTP when empty.
	WebConfigFile string
	// Metrics is what /metrics answers: a [Metrics] or a [Server].
	Metrics interface{ Handler() http.Handler }
	// Live and Ready decide the answer of /live and /ready: 200 when they
	// return nil, 503 with the error's text otherwise. nil means always 200.
	// They must return soon and be safe for concurrent use.
	Live, Ready func() error
	// ConnState is told the states of connections, as that of [http.Server] is;
	// nobody when nil.
	ConnState func(net.Conn, http.ConnState)
	Log       *slog.Logger // discards when nil
}

// Listen opens the listener that [Serve] would open. A caller that wants a bad
// address to fail before anything else starts passes the result as
// [ServeConfig.Listener].
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

// CheckWebConfig reads the file as [Serve] would, with the certificates it
// names. An empty path is fine.
func CheckWebConfig(path string) error {
	if err := web.Validate(path); err != nil {
		return fmt.Errorf("web config file %s: %w", path, err)
	}
	return nil
}

// quiet drops what the toolkit says of a start that went well: where it listens
// is said already, in the words of the other log lines.
type quiet struct{ slog.Handler }

func (q quiet) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn && q.Handler.Enabled(ctx, level)
}

// Serve answers /metrics, /live and /ready until ctx ends, then lets requests
// in flight finish for a short time and returns nil. Any other end is an error.
func Serve(ctx context.Context, cfg ServeConfig) error {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	l := cfg.Listener
	if l == nil {
		var err error
		if l, err = Listen(cfg.Address); err != nil {
			return err
		}
		cfg.Log.Info("metrics are served", "address", l.Addr().String(), "web_config_file", cfg.WebConfigFile)
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
		done <- web.Serve(l, srv, &web.FlagConfig{WebConfigFile: &cfg.WebConfigFile}, slog.New(quiet{cfg.Log.Handler()}))
	}()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if srv.Shutdown(stop) != nil {
			_ = srv.Close() // cut off what did not finish; Shutdown has closed the listener
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

// probe answers as Kubernetes expects of an HTTP probe.
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
