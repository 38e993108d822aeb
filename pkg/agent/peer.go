package agent

import (
	"context"
	"time"

	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
	"github.com/quarry-csi/quarry/pkg/fault/rpcfault"
	"github.com/quarry-csi/quarry/pkg/image"
)

var (
	_ image.ChainAgent = (*peer)(nil)
	_ image.Encrypter  = (*peer)(nil)
)

// Freeze implements image.Agent.
func (p *peer) Freeze(ctx context.Context, h image.Handle, limit time.Duration) (image.Frozen, error) {
	ctx, err := p.hub.carry(ctx, h.Domain)
	if err != nil {
		return "", err
	}
	r, err := p.rpc.Freeze(ctx, &agentpb.FreezeRequest{Handle: toHandle(h), LimitNanoseconds: limit.Nanoseconds()})
	return image.Frozen(r.GetState()), rpcfault.FromStatus(err)
}

// Thaw implements image.Agent.
func (p *peer) Thaw(ctx context.Context, h image.Handle) error {
	ctx, err := p.hub.carry(ctx, h.Domain)
	if err != nil {
		return err
	}
	_, err = p.rpc.Thaw(ctx, &agentpb.ImageRequest{Handle: toHandle(h)})
	return rpcfault.FromStatus(err)
}

// Staged implements image.Agent.
func (p *peer) Staged(ctx context.Context, h image.Handle) (bool, error) {
	ctx, err := p.hub.carry(ctx, h.Domain)
	if err != nil {
		return false, err
	}
	r, err := p.rpc.Staged(ctx, &agentpb.ImageRequest{Handle: toHandle(h)})
	return r.GetStaged(), rpcfault.FromStatus(err)
}

// Layers implements image.ChainAgent.
func (p *peer) Layers(ctx context.Context, h image.Handle) error {
	ctx, err := p.hub.carry(ctx, h.Domain)
	if err != nil {
		return err
	}
	_, err = p.rpc.Layers(ctx, &agentpb.ImageRequest{Handle: toHandle(h)})
	return rpcfault.FromStatus(err)
}

// Encrypts implements image.Encrypter.
func (p *peer) Encrypts(ctx context.Context) error {
	_, err := p.rpc.Encrypts(ctx, &agentpb.EncryptsRequest{})
	return rpcfault.FromStatus(err)
}

// Switch implements image.ChainAgent.
func (p *peer) Switch(ctx context.Context, images []image.Staging, prepared string) error {
	ctx, err := p.about(ctx, images...)
	if err != nil {
		return err
	}
	r := switchRequest(images)
	r.Prepared = prepared
	_, err = p.rpc.Switch(ctx, r)
	return rpcfault.FromStatus(err)
}

// about is carry for what changes chains, after whatever may be writing their slabs has ended.
func (p *peer) about(ctx context.Context, images ...image.Staging) (context.Context, error) {
	for _, st := range images {
		if err := p.hub.settleChain(ctx, st); err != nil {
			return nil, err
		}
	}
	return p.hub.carry(ctx, domainsOf(images)...)
}

func domainsOf(images []image.Staging) (out []string) {
	for _, st := range images {
		out = append(out, st.Domain)
	}
	return out
}

func switchRequest(images []image.Staging) *agentpb.SwitchRequest {
	r := &agentpb.SwitchRequest{}
	for _, st := range images {
		r.Images = append(r.Images, toStaging(st))
	}
	return r
}

// Prepare implements image.ChainAgent.
func (p *peer) Prepare(ctx context.Context, images []image.Staging) (string, error) {
	ctx, err := p.about(ctx, images...)
	if err != nil {
		return "", err
	}
	r, err := p.rpc.Prepare(ctx, switchRequest(images))
	return r.GetPrepared(), rpcfault.FromStatus(err)
}

// Hold implements image.ChainAgent.
func (p *peer) Hold(ctx context.Context, images []image.Staging, prepared string) error {
	ctx, err := p.hub.carry(ctx, domainsOf(images)...) // Prepare has waited for whoever may have been writing
	if err != nil {
		return err
	}
	r := switchRequest(images)
	r.Prepared = prepared
	_, err = p.rpc.Hold(ctx, r)
	return rpcfault.FromStatus(err)
}

// Release implements image.ChainAgent.
func (p *peer) Release(ctx context.Context, prepared string) error {
	_, err := p.rpc.Release(ctx, &agentpb.ReleaseRequest{Prepared: prepared})
	return rpcfault.FromStatus(err)
}

// Merge implements image.ChainAgent.
func (p *peer) Merge(ctx context.Context, chain image.Staging) (image.Merging, error) {
	ctx, err := p.about(ctx, chain)
	if err != nil {
		return image.Merging{}, err
	}
	for _, slab := range chain.Slabs[:min(2, len(chain.Slabs))] { // what is merged, and into what
		if err := p.hub.settle(ctx, image.Place{Domain: chain.Domain, Slab: slab.ID}, true); err != nil {
			return image.Merging{}, err
		}
	}
	r, err := p.rpc.Merge(ctx, &agentpb.ChainRequest{Chain: toStaging(chain)})
	return image.Merging{Left: r.GetLeft(), Done: r.GetDone()}, rpcfault.FromStatus(err)
}

// StopMerge implements image.ChainAgent.
func (p *peer) StopMerge(ctx context.Context, chain image.Staging) error {
	ctx, err := p.hub.carry(ctx, chain.Domain)
	if err != nil {
		return err
	}
	_, err = p.rpc.StopMerge(ctx, &agentpb.ChainRequest{Chain: toStaging(chain)})
	return rpcfault.FromStatus(err)
}
