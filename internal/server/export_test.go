package server

import (
	"context"
	"io"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/admin"
)

// Figures are what operators are told of a deployment, in a process without sockets.
func (d *Domain) Figures(ctx context.Context, deployment string) (admin.Figures, error) {
	return d.operator.Figures(ctx, deployment)
}

// Clock is what they are told of the clock.
func (d *Domain) Clock() clock.State { return d.clock.State() }

// ConfirmClock is their word that it is right.
func (d *Domain) ConfirmClock(ctx context.Context, at time.Time) (bool, error) {
	return d.confirmClock(ctx, at)
}

// Automatic is what automatic rotation is about to do.
func (d *Domain) Automatic(deployment string) admin.Automatic {
	for _, dep := range d.deployments {
		if dep.Name == deployment {
			return dep.automatic()
		}
	}
	return admin.Automatic{}
}

// Backup is a copy of what is stored.
func (d *Domain) Backup(ctx context.Context, w io.Writer) error {
	_, err := d.store.Backup(ctx, w)
	return err
}
