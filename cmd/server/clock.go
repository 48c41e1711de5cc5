package main

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/operator/renewd"
)

// shownClock is the state of the server's clock as -o json prints it.
type shownClock struct {
	Shows         *time.Time `json:"shows"`
	AtLeast       *time.Time `json:"at_least"`
	DoubtSeconds  float64    `json:"doubt_seconds"` // positive: ahead; negative: set back; 0: not in doubt
	SteadySeconds float64    `json:"steady_seconds,omitempty"`
	RotationWaits bool       `json:"rotation_waits"`
}

// clockCommand is "clock show".
func clockCommand(ctx context.Context, call *cli.Call) error {
	c := newClient(call)
	if _, err := c.Parse(); err != nil {
		return err
	}
	return c.do(ctx, func(ctx context.Context, o api.OperatorClient) error {
		resp, err := o.GetClock(ctx, &api.GetClockRequest{Scope: c.scope()})
		if err != nil {
			return err
		}
		return c.printClock(resp.GetClock())
	})
}

// confirmCommand is "clock confirm".
func confirmCommand(ctx context.Context, call *cli.Call) error {
	c := newClient(call)
	given, err := c.Parse("time that another clock shows")
	if err != nil {
		return err
	}
	at, err := time.Parse("2006-01-02T15:04Z07:00", given[0])
	if err != nil {
		at, err = time.Parse(time.RFC3339, given[0])
	}
	if err != nil {
		return cli.Usagef("clock confirm: %q is not a time: give it with its zone, such as 2026-01-02T15:04Z or 2026-01-02T16:04+01:00", given[0])
	}
	return c.do(ctx, func(ctx context.Context, o api.OperatorClient) error {
		resp, err := o.ConfirmClock(ctx, &api.ConfirmClockRequest{Scope: c.scope(), Time: timestamppb.New(at)})
		if err != nil {
			return err
		}
		return c.printClock(resp.GetClock())
	})
}

func (c *client) printClock(p *api.Clock) error {
	doubt, steady := p.GetDoubt().AsDuration(), p.GetSteadyFor().AsDuration()
	out := shownClock{
		Shows: moment(p.GetShows()), AtLeast: moment(p.GetAtLeast()), DoubtSeconds: doubt.Seconds(),
		SteadySeconds: steady.Seconds(), RotationWaits: p.GetRotationWaits(),
	}
	if c.JSON() {
		return cli.PrintJSON(c.Stdout, out)
	}
	cells := []string{"no", "-", "continues"}
	switch {
	case doubt > 0:
		cells = []string{doubt.Round(time.Minute).String() + " ahead", steady.Round(time.Second).String(), "continues"}
	case doubt < 0:
		cells = []string{"set back by " + (-doubt).Round(time.Minute).String(), steady.Round(time.Second).String(), "continues"}
	}
	if out.RotationWaits {
		cells[2] = "waits"
	}
	table := cli.NewTable(c.Stdout)
	_, _ = fmt.Fprintf(table, "CLOCK SHOWS\tAT LEAST\tIN DOUBT\tSTEADY FOR\tAUTOMATIC ROTATION\n%s\t%s\t%s\t%s\t%s\n",
		utc(out.Shows), utc(out.AtLeast), cells[0], cells[1], cells[2])
	if err := cli.Flush(table); err != nil {
		return err
	}
	if why := renewd.ClockDoubt(p); why != "" {
		return cli.Printf(c.Stderr, "The server's clock is in doubt: %s.\n", why)
	}
	return nil
}

// utc formats a time without its distance from now, because this machine's clock may be
// the one in doubt.
func utc(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return clock.Text(*t)
}
