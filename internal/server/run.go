package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/socket"
	"github.com/renewd/renewd/metrics"
)

// Run serves until ctx is done and then returns nil. It returns an error if it cannot
// start or continue, such as an address that is in use. When it returns, every
// goroutine has ended and the store is closed.
func (d *Domain) Run(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, d.Close()) }()
	start, err := d.listen()
	if err != nil {
		return err
	}
	// Issue the certificate now, so that the keyset that is active at the start signs it.
	// The error is not lost: each later handshake fails with it.
	_, _ = d.certificate(nil)
	group, ctx := errgroup.WithContext(ctx)
	for _, serve := range start {
		group.Go(func() error { return serve(ctx) })
	}
	for _, dep := range d.deployments {
		group.Go(func() error { return dep.ledger.Run(ctx) })
		group.Go(func() error { return dep.scheduler.Run(ctx) })
		group.Go(func() error { return dep.pruneLedger(ctx, d.cfg.Log) })
		group.Go(func() error { return dep.pruneEntries(ctx, d.cfg.Log) })
	}
	group.Go(func() error { return d.federation.Run(ctx) })
	group.Go(func() error { return d.watchClock(ctx) })
	d.running.Store(true)
	group.Go(func() error {
		<-ctx.Done() // calls in flight end, and no new ones are answered
		d.running.Store(false)
		return nil
	})
	d.cfg.Log.Info("server started", "trust_domain", d.cfg.TrustDomain.Name(), "version", d.cfg.Version)
	d.cfg.Started()
	err = group.Wait()
	d.cfg.Log.Info("server stopped")
	return err
}

// listeners are the open listeners, and a function that serves each of them.
type listeners struct {
	d     *Domain
	open  []net.Listener
	start []func(context.Context) error
}

// listen opens every listener before anything is served, so that an address in use
// fails the start.
func (d *Domain) listen() ([]func(context.Context) error, error) {
	l := &listeners{d: d}
	if err := l.openAll(); err != nil {
		for _, lis := range l.open {
			_ = lis.Close()
		}
		return nil, err
	}
	return l.start, nil
}

func (l *listeners) openAll() error {
	d := l.d
	for _, dep := range d.deployments {
		field := "deployments." + dep.Name + ".listen_address"
		if dep.Listener != nil {
			l.add(field, dep.Listener, dep.server.Serve)
		} else if err := l.tcp(field, dep.ListenAddress, dep.server.Serve); err != nil {
			return err
		}
	}
	if d.cfg.AdminSocket != "" {
		lis, err := socket.Listen(d.cfg.AdminSocket, d.cfg.AdminSocketMode)
		if err != nil {
			return fmt.Errorf("admin_socket: %w", err)
		}
		l.add("admin_socket", lis, d.operator.ServeUnix)
		l.start = append(l.start, func(ctx context.Context) error { lis.Watch(ctx, d.cfg.Log); return nil })
	}
	if err := l.tcp("operators.address", d.cfg.OperatorAddress, d.operator.ServeTLS); err != nil {
		return err
	}
	if d.cfg.EndpointListener != nil {
		l.add("bundle_endpoint.address", d.cfg.EndpointListener, d.endpoint.Serve)
	} else if d.endpoint != nil {
		if err := l.tcp("bundle_endpoint.address", d.cfg.EndpointAddress, d.endpoint.Serve); err != nil {
			return err
		}
	}
	return l.tcp("metrics.address", d.cfg.MetricsAddress, d.serveMetrics)
}

type serve = func(context.Context, net.Listener) error

// tcp listens on an address. It does nothing if the address is empty.
func (l *listeners) tcp(field, address string, serve serve) error {
	if address == "" {
		return nil
	}
	lis, err := listen.TCP(address)
	if err != nil {
		return fmt.Errorf("%s: %w", field, err)
	}
	l.add(field, lis, serve)
	return nil
}

func (l *listeners) add(field string, lis net.Listener, serve serve) {
	l.open = append(l.open, lis)
	l.d.cfg.Log.Info("listening", "endpoint", field, "address", lis.Addr().String())
	l.start = append(l.start, func(ctx context.Context) error {
		if err := serve(ctx, lis); err != nil {
			return fmt.Errorf("%s: %w", field, err)
		}
		return nil
	})
}

func (d *Domain) serveMetrics(ctx context.Context, lis net.Listener) error {
	srv, serve := metrics.NewHTTPServer(metrics.HTTPConfig{WebConfigFile: d.cfg.WebConfigFile, Metrics: d.metrics, Ready: d.Ready, Log: d.cfg.Log})
	return listen.ServeHTTP(ctx, d.connections, lis, srv, serve)
}

// Ready returns nil while the server answers and every served deployment can sign what
// verifies.
func (d *Domain) Ready() error {
	if !d.running.Load() {
		return errors.New("starting or stopping")
	}
	for _, dep := range d.deployments {
		if !dep.serves() {
			continue
		}
		switch now, active := d.cfg.Now(), dep.keysets.Active(); {
		case !now.Before(active.ExpiresAt):
			return fmt.Errorf("the active keyset of deployment %s has expired: nothing can be signed", dep.Name)
		case now.Before(active.ValidFrom):
			return fmt.Errorf("the active keyset of deployment %s is not valid before %s: nothing that it signs verifies", dep.Name, active.ValidFrom.UTC().Format(time.DateTime))
		}
	}
	return nil
}
