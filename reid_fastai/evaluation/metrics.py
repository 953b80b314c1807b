__all__=['RetrievalResults']
import numpy as np, torch
class RetrievalResults:
    @classmethod
    def from_embeddings(cls,qf,qp,qc,gf,gp,gc,metric='cosine'):
        qf,gf=torch.as_tensor(qf).float(),torch.as_tensor(gf).float()
        if metric=='cosine': qf,gf=torch.nn.functional.normalize(qf),torch.nn.functional.normalize(gf)
        r=cls(); aps,first=[],[]
        for i in range(0,len(qf),256):
            D=torch.cdist(qf[i:i+256],gf).numpy()
            for j in range(len(D)):
                k=i+j; o=np.argsort(D[j],kind='stable'); keep=~((gp[o]==qp[k])&(gc[o]==qc[k]))&(gp[o]!=-1)
                m=(gp[o]==qp[k])[keep]
                if not m.any(): continue
                pos=np.flatnonzero(m); aps.append(np.mean(np.arange(1,len(pos)+1)/(pos+1))); first.append(pos[0])
        r.mAP=float(np.mean(aps)); r.rank1=float(np.mean(np.array(first)==0)); return r
    def __repr__(self): return f'mAP {self.mAP:.4f} R1 {self.rank1:.4f}'
