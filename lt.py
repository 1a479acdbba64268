exec(open("/tmp/w/s8/tinyp.py").read().split("R={k:[]")[0])
import timeit
from dyads.ops import fused
from dyads.ops import fused as F
import dyads.ops.fused as FM
a=A["mode"].q_proj
x=x0.detach().requires_grad_()
def tm(name,f,n=1000):
    f(); print(f"{name:40} {min(timeit.repeat(f,number=n,repeat=7))/n*1e6:6.2f} µs")
tm("forward",lambda: a(x))
tm("forward+backward",lambda: a(x).backward(dy))
l=A["lora"].q_proj
tm("lora forward",lambda: l(x))
tm("lora forward+backward",lambda: l(x).backward(dy))
core=a.core("default"); Aa,Bb=a.dyads_A["default"],a.dyads_B["default"]
tm("fused",lambda: fused(x,Aa,Bb,core,None,base=a._frozen()))
tm("collect?",lambda: core.has_auxiliary_loss)
W=core.router_rows()
tm("_down",lambda: FM._down(Aa.detach(),W.detach(),torch.float32))
h=torch.randn(1,2,8); sc=torch.randn(1,2,64)
tm("select",lambda: core.select(h,sc,None)); g=core.select(h,sc,None)
tm("mix",lambda: core.mix(h,g))
du=torch.randn(1,2,64)
tm("gradients",lambda: core.gradients(h,g,du))
