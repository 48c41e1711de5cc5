package agent

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/renewd/renewd/internal/agent/upstream"
	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/socket"
	"github.com/renewd/renewd/metrics"
)

// Run serves until ctx is done, and returns nil then, or the error that made
// going on useless: a socket that cannot be opened, nothing that proves the
// node, or a server that has banned it. When it returns, everything it started
// has ended.
func (a *Agent) Run(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, a.close()) }()
	listener := a.cfg.Listener
	if listener == nil {
		lis, err := socket.Listen(a.cfg.SocketPath, a.cfg.SocketMode)
		if err != nil {
			return fmt.Errorf("open the Workload API socket: %w", err)
		}
		a.socket.Store(lis)
		listener = lis
	}
	serveMetrics, err := a.listenMetrics()
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	a.syncs.note(nil)
	a.refreshes.note(nil)
	a.log.Info("agent starts", "trust_domain", a.cfg.TrustDomain.Name(), "server", a.cfg.ServerAddress,
		"socket", listener.Addr().String(), "version", a.cfg.Version)
	if a.cfg.Started != nil {
		a.cfg.Started()
	}
	stopped := ctx
	group, ctx := errgroup.WithContext(ctx)
	serving := ctx
	if a.keeper != nil {
		// SVIDs above the cache's limit may be evicted when their streams end. So
		// those end after everything was kept.
		var endServing context.CancelFunc
		serving, endServing = context.WithCancel(context.WithoutCancel(ctx))
		defer endServing()
		group.Go(func() error {
			defer endServing()
			return a.keeper.Follow(ctx, a.cache)
		})
	}
	group.Go(func() error {
		a.release(ctx)
		return nil
	})
	group.Go(func() error {
		a.sweep(ctx)
		return nil
	})
	group.Go(func() error { return a.store.Run(ctx) })
	group.Go(func() error {
		a.followTrust(ctx)
		return nil
	})
	group.Go(func() error { return named("Workload API", a.workload.Serve(serving, listener)) })
	if lis := a.socket.Load(); lis != nil {
		group.Go(func() error { lis.Watch(ctx, a.log); return nil })
	}
	group.Go(func() error { return serveMetrics(ctx) })
	group.Go(func() error {
		if err := a.connect(ctx); err != nil {
			return err
		}
		group.Go(func() error { return a.refresher.Run(ctx) })
		group.Go(func() error { return a.renewer.Run(ctx) })
		group.Go(func() error { return a.report(ctx) })
		return a.syncEntries(ctx)
	})
	err = group.Wait()
	if stopped.Err() != nil && !errors.Is(err, upstream.ErrBanned) {
		err = nil // whatever was under way failed because it was to end
	}
	a.log.Info("agent stopped")
	return err
}

func named(what string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// listenMetrics opens the HTTP listener, if there is to be one, and returns what
// serves it.
func (a *Agent) listenMetrics() (func(context.Context) error, error) {
	if a.cfg.MetricsAddress == "" {
		return func(context.Context) error { return nil }, nil
	}
	listener, err := metrics.Listen(a.cfg.MetricsAddress)
	if err != nil {
		return nil, named("metrics", err)
	}
	a.log.Info("metrics are served", "address", listener.Addr().String(), "web_config_file", a.cfg.WebConfigFile)
	return func(ctx context.Context) error {
		limited := listen.NewPool().Listen(listener, listen.HTTP, nil)
		return named("metrics", metrics.Serve(ctx, metrics.ServeConfig{
			Listener:      limited,
			ConnState:     limited.ConnState,
			Metrics:       a.metrics,
			WebConfigFile: a.cfg.WebConfigFile,
			Ready:         a.ready,
			Log:           a.log,
		}))
	}, nil
}

// connect gets the node trusted and proved. It returns at once when a valid
// identity was kept.
func (a *Agent) connect(ctx context.Context) error {
	if a.trust() == nil {
		b, err := a.client.Bootstrap(ctx)
		if err != nil {
			return fmt.Errorf("bootstrap trust: %w", err)
		}
		a.bootstrap.Store(b)
	}
	return named("prove the node", a.client.Attest(ctx))
}
