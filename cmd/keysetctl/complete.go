package main

import (
	"context"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/renewd/renewd/internal/operator/runbook"
)

// completeTimeout limits the server's answer for a completion: the operator waits for it
// at the prompt.
const completeTimeout = 2 * time.Second

// complete returns a completion with the IDs of the keysets in these states. Without an
// answer of the server there is none.
func (p *program) complete(states ...runbook.State) cobra.CompletionFunc {
	return func(c *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(c.Context(), completeTimeout)
		defer cancel()
		c.SetContext(ctx)
		var ids []cobra.Completion
		_ = p.with(c, func(ctx context.Context, b runbook.Backend) error {
			s, err := b.Status(ctx)
			for _, k := range s.Keysets {
				if slices.Contains(states, k.State) {
					ids = append(ids, cobra.CompletionWithDesc(k.ID, string(k.State)))
				}
			}
			return err
		}) // an error at the prompt would be in the way
		return ids, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeFlag registers the completion of a flag's value, which exists.
func completeFlag(c *cobra.Command, flag string, f cobra.CompletionFunc) {
	if err := c.RegisterFlagCompletionFunc(flag, f); err != nil {
		panic(err)
	}
}
