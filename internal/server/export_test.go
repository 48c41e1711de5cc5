package server

import (
	"context"
	"io"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/admin"
	"github.com/renewd/renewd/internal/server/rotation"
)

// Figures returns the figures that operators see of a deployment, without a socket.
func (d *Domain) Figures(ctx context.Context, deployment string) (admin.Figures, error) {
	return d.operator.Figures(ctx, deployment)
}

// Clock returns the state of the clock that operators see.
func (d *Domain) Clock() clock.State { return d.clock.State() }

// ConfirmClock confirms the clock as an operator does.
func (d *Domain) ConfirmClock(ctx context.Context, at time.Time) (bool, error) {
	return d.confirmClock(ctx, at)
}

// Automatic returns the next step of automatic rotation.
func (d *Domain) Automatic(deployment string) rotation.Preview {
	for _, dep := range d.deployments {
		if dep.Name == deployment {
			return dep.scheduler.Automatic()
		}
	}
	return rotation.Preview{}
}

// Backup writes a copy of the store.
func (d *Domain) Backup(ctx context.Context, w io.Writer) error {
	_, err := d.store.Backup(ctx, w)
	return err
}
